"""From a fit to what more ranks would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from largebatch.benchmark.fit import NOTHING_MEASURED, Fit, Result, fit, rate_of
from largebatch.benchmark.options import Options
from largebatch.benchmark.performance import ALGORITHMS, Layout, Parameters, predict
from largebatch.errors import UserError

ASSUMED_OVERHEAD = 15 / 12.8  # §4 of the paper: 15 Gbit/s are needed to move 12.8
ASSUMED_LATENCY = 25e-6  # seconds of a message over Ethernet, with the software on both sides


def check_forecast(options: Options, world_size: int, measured_per_node: int) -> None:
    """Raise UserError for what cannot be predicted from this launch. Cheap, so it comes before measuring."""
    if options.predict and (options.mode == "strong" or options.ranks[-1] == 1):
        raise UserError(NOTHING_MEASURED)
    per_node = options.ranks_per_node or measured_per_node
    for count in options.predict:
        if count > per_node and options.network is None and options.ranks[-1] <= measured_per_node:
            raise UserError(
                f"--predict: {count} ranks are {Layout(count, per_node).nodes} nodes of {per_node}, and nothing "
                "between nodes is measured here; give their network (--network 50gbit), launch over several nodes, or "
                "say --ranks-per-node"
            )
        if min(count, per_node) > 1 and measured_per_node == 1 and world_size > 1:
            raise UserError(
                f"--predict: {min(count, per_node)} ranks on a node, but nothing inside a node is measured here "
                "(the launch has 1 rank on each); launch several on a node, or give --ranks-per-node 1"
            )


def forecast(result: Result, options: Options) -> dict[str, Any]:
    """What `benchmark.json` holds as `prediction`. Raises UserError if nothing of communication was measured."""
    made = fit([result])
    parameters, rate, assumptions = _network(made.parameters, result, options)
    layouts = [Layout(count, options.ranks_per_node or result["ranks_per_node"]) for count in options.predict]
    return {
        "algorithm": made.algorithm,
        "parameters": parameters.as_dict(),
        "assumptions": assumptions,
        "messages": [asdict(message) for message in made.sent],
        "leave_one_out": made.errors,
        "error": made.error,
        "predictions": [
            _prediction(replace(made, parameters=parameters), layout, algorithm, rate)
            for layout in layouts
            for algorithm in _headline_first(made.algorithm)
        ],
    }


def _network(parameters: Parameters, result: Result, options: Options) -> tuple[Parameters, float, list[str]]:
    """The parameters and the nominal rate between the predicted nodes, and what is assumed about them."""
    between = any(Layout(a["world_size"], result["ranks_per_node"]).nodes > 1 for a in result["allreduce"])
    rate = options.network
    if rate is None:
        return parameters, rate_of(result), []
    if between and result.get("measured_network"):
        return parameters, rate, []
    assumptions = [
        f"network overhead {ASSUMED_OVERHEAD:.2f}: bytes between nodes take so many times what {8e-9 * rate:g} Gbit/s "
        "would (§4 of the paper), since its share of the nominal rate was not measured"
    ]
    changed = {"network_overhead": ASSUMED_OVERHEAD}
    if not between:
        changed["latency_between"] = ASSUMED_LATENCY
        assumptions.append(f"latency between nodes {1e6 * ASSUMED_LATENCY:g} µs a message, since none was measured")
    return replace(parameters, **changed), rate, assumptions


def _headline_first(algorithm: str) -> Sequence[str]:
    return [algorithm, *(other for other in ALGORITHMS if other != algorithm)]


def _prediction(made: Fit, layout: Layout, algorithm: str, rate: float) -> dict[str, Any]:
    predicted = predict(made.parameters, made.sent, layout, algorithm=algorithm, rate=rate)
    measured = made.reference.measurement
    images = measured["global_batch"] / measured["world_size"] * layout.ranks
    # The images of a rank are the same, so efficiencies are as the times of a step.
    gain = measured["step"] / predicted.step
    efficiencies = {name: found["value"] * gain for name, found in measured["efficiencies"].items()}
    return {
        "world_size": layout.ranks,
        "ranks_per_node": layout.ranks_per_node,
        "nodes": layout.nodes,
        "algorithm": algorithm,
        **asdict(predicted),
        "global_batch": round(images),
        "images_per_second": images / predicted.step,
        "efficiency": measured["efficiency"] * gain,
        "baseline": measured["baseline"],
        "efficiencies": efficiencies,
    }
