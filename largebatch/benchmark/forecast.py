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
            for algorithm in _algorithms(made.algorithm, layout)
        ],
    }


def _network(parameters: Parameters, result: Result, options: Options) -> tuple[Parameters, float, list[str]]:
    """The parameters and the nominal rate between the predicted nodes, and what is assumed about them."""
    between = any(Layout(a["world_size"], result["ranks_per_node"]).nodes > 1 for a in result["allreduce"])
    rate = rate_of(result) if options.network is None else options.network
    if not between and options.network is None:
        return parameters, rate, []  # one node
    changed, assumptions = {}, []
    if options.network is not None and not (between and result.get("measured_network")):
        own_work = parameters.seconds_per_byte_inside
        changed = {"network_overhead": ASSUMED_OVERHEAD, "host_per_byte": own_work}
        assumptions = [
            f"network overhead {ASSUMED_OVERHEAD:.2f}: bytes between nodes take this many times what {8e-9 * rate:g} "
            "Gbit/s would (§4 of the paper), since its share of the nominal rate was not measured",
            f"hosts' own work on a byte between nodes: {1e9 * own_work:.3g} ns beside the network's, what a byte takes "
            "inside a node"
            if own_work
            else "hosts' own work on a byte between nodes: none, since none could be separated in the measurements",
        ]
        if not between:
            latency = changed["latency_between"] = max(ASSUMED_LATENCY, parameters.latency_inside)
            assumptions.append(
                f"latency between nodes {1e6 * latency:.0f} µs a message, the larger of {1e6 * ASSUMED_LATENCY:g} µs "
                f"and the {1e6 * parameters.latency_inside:.0f} µs fitted inside a node, since none was measured"
            )
    known, dearer = _no_cheaper_than_inside(replace(parameters, **changed), rate)
    return known, rate, assumptions + dearer


def _no_cheaper_than_inside(p: Parameters, rate: float) -> tuple[Parameters, list[str]]:
    """`p` with messages and bytes between nodes at least as dear as inside one, and what that changed.

    The hosts that send and add are the same, and a wire comes on top.
    """
    assumptions, changed = [], {}
    if p.latency_between < p.latency_inside:
        changed["latency_between"] = p.latency_inside
        assumptions.append(
            f"latency between nodes {1e6 * p.latency_inside:.0f} µs a message, as fitted inside a node, which cannot "
            f"be longer; measured between nodes: {1e6 * p.latency_between:.0f} µs"
        )
    missing = p.seconds_per_byte_inside - p.network_overhead / rate - p.host_per_byte
    if missing > 0:
        changed["host_per_byte"] = p.host_per_byte + missing
        assumptions.append(
            f"a byte between nodes takes {1e9 * p.seconds_per_byte_inside:.3g} ns, as fitted inside a node, where it "
            f"cannot take longer; measured between nodes: {1e9 * (p.network_overhead / rate + p.host_per_byte):.3g} ns"
        )
    return replace(p, **changed), assumptions


def _algorithms(own: str, layout: Layout) -> Sequence[str]:
    """The measured one first. Two levels where they differ: on one node they are a ring, on nodes of up to three
    ranks, where a ring has no more messages, halving and doubling."""
    levels = layout.nodes > 1 and layout.on_node > 3
    return [own, *(other for other in ALGORITHMS if other != own and (levels or other != "two_level"))]


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
