"""The performance model: its formulas, its fit to data whose truth is known, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from largebatch.benchmark import paper
from largebatch.benchmark.fit import fit, fit_communication, nonnegative_least_squares, rate_of
from largebatch.benchmark.forecast import check_forecast, forecast
from largebatch.benchmark.options import Options, parse_rate
from largebatch.benchmark.performance import (
    ALGORITHMS,
    Layout,
    Message,
    Parameters,
    allreduce_seconds,
    expected_maximum,
    messages,
    predict,
    replay,
)
from largebatch.benchmark.tables import prediction_notes
from largebatch.errors import UserError

RATE = 1e9


def _seconds(algorithm: str, layout: Layout, **parameters: float) -> float:
    found = messages(algorithm, 1e6, layout, RATE)
    return allreduce_seconds(Parameters(compute=0.0, **parameters), found)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8])
def test_on_one_node_every_algorithm_moves_the_papers_volume(ranks: int) -> None:
    for algorithm in ("ring", "halving_doubling", "two_level"):
        layout = Layout(ranks, 8)
        volume = _seconds(algorithm, layout, seconds_per_byte_inside=1e-9)
        assert volume == pytest.approx(2 * (ranks - 1) / ranks * 1e-3)
        assert _seconds(algorithm, layout, latency_between=1.0, network_overhead=1.0) == 0


def test_one_rank_on_each_node_uses_the_links_between_them_only() -> None:
    for algorithm in ("ring", "halving_doubling", "two_level"):
        assert _seconds(algorithm, Layout(4, 1), network_overhead=1.0) == pytest.approx(1.5e-3)
        assert _seconds(algorithm, Layout(4, 1), latency_inside=1.0, seconds_per_byte_inside=1.0) == 0


def test_messages_that_follow_one_another() -> None:
    eight = Layout(8, 1)
    assert _seconds("ring", eight, latency_between=1.0) == 14
    assert _seconds("halving_doubling", eight, latency_between=1.0) == 6
    assert _seconds("halving_doubling", Layout(44, 1), latency_between=1.0) == 12
    assert _seconds("two_level", Layout(32, 8), latency_between=1.0) == 4
    assert _seconds("two_level", Layout(32, 8), latency_inside=1.0) == 14


def test_what_leaves_a_node_of_four() -> None:
    layout = Layout(8, 4)
    assert _seconds("two_level", layout, network_overhead=1.0) == pytest.approx(1.0e-3)
    assert _seconds("ring", layout, network_overhead=1.0) == pytest.approx(2 * 7 / 8 * 1e-3)


def test_expected_maximum_of_normal_numbers() -> None:
    assert expected_maximum(1) == pytest.approx(0.0, abs=1e-9)
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi))
    draws = np.random.default_rng(0).normal(size=(20_000, 64)).max(axis=1)
    assert expected_maximum(64) == pytest.approx(draws.mean(), abs=0.02)


def test_replay_against_a_simulation_in_small_ticks() -> None:
    generator = random.Random(0)
    for _ in range(20):
        sent = [Message(generator.randint(1, 50), ready) for ready in sorted(generator.random() for _ in range(5))]
        arrived, total = replay(sent, compute=100.0, seconds=lambda size: size)
        tick, now, left = 0.01, 0.0, [[message.ready * 100.0, message.size] for message in sent]
        while left:
            if now >= left[0][0] - 1e-9:
                left[0][1] -= tick
                if left[0][1] <= 1e-9:
                    left.pop(0)
            now += tick
        assert total == sum(message.size for message in sent)
        assert arrived == pytest.approx(now, abs=0.1)


def test_communication_that_fits_behind_the_backward_pass_is_hidden() -> None:
    sent = [Message(1e6, 0.5), Message(1e6, 1.0)]
    quick = Parameters(compute=0.1, network_overhead=1.0)
    found = predict(quick, sent, Layout(2, 1), algorithm="ring", rate=1e8)
    assert found.communication == pytest.approx(0.02)
    assert found.exposed_communication == pytest.approx(0.01)
    assert found.step == pytest.approx(0.11)
    assert found.limit == "bandwidth between nodes"


def test_the_step_waits_for_the_slowest_and_loses_what_contention_takes() -> None:
    parameters = Parameters(compute=0.1, jitter=0.01, other=0.002, data_wait=0.003, contention=0.5, network_overhead=1)
    found = predict(parameters, [Message(1e6, 0.0)], Layout(2, 1), algorithm="ring", rate=1e9)
    compute = 0.1 + 0.01 / math.sqrt(math.pi)
    assert found.compute == pytest.approx(compute)
    assert found.step == pytest.approx(compute + 0.5 * 0.001 + 0.005)
    assert found.limit == "waiting for the slowest rank"


def test_least_squares_with_nothing_below_zero() -> None:
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert nonnegative_least_squares(matrix, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])
    assert nonnegative_least_squares(matrix, np.array([1.0, 3.0, 5.0])) == pytest.approx([0.0, 22 / 14])
    assert nonnegative_least_squares(matrix, -np.ones(3)) == pytest.approx([0.0, 0.0])


TRUTH = Parameters(
    compute=0.05,
    other=0.002,
    latency_inside=1e-5,
    seconds_per_byte_inside=1e-10,
    latency_between=1e-4,
    network_overhead=1.06,
    host_per_byte=2e-10,
    contention=0.3,
)
SENT = [Message(4e6, 0.6), Message(1e6, 1.0)]


def _result(
    rate: float | None,
    counts: tuple[int, ...],
    ranks_per_node: int = 1,
    reduction: str = "fast",
    truth: Parameters = TRUTH,
) -> dict[str, Any]:
    """A `benchmark.json` of a machine that behaves as `truth`."""
    used, algorithm = rate or 1e9, "ring"
    measured = []
    for n in counts:
        step = predict(truth, SENT, Layout(n, ranks_per_node), algorithm=algorithm, rate=used).step
        found = {
            "mode": "weak", "world_size": n, "global_batch": 32 * n, "step": step, "other": 0.002, "data_wait": 0.0,
            "compute_steps_by_rank": [[0.05] * 4] * n, "compute_by_rank": [0.05] * n, "replay_seconds": 0.05,
            "buckets": [{"size": m.size, "ready": m.ready * 0.05} for m in SENT],
            "efficiency": 0.054 / step, "baseline": "1 rank without DDP",
            "efficiencies": {"1 rank without DDP": {"value": 0.054 / step, "spread": 0.0}},
        }  # fmt: skip
        measured.append(found)
    allreduce = [
        {
            "reduction": reduction,
            "world_size": n,
            "size": size,
            "seconds": allreduce_seconds(truth, messages(algorithm, size, Layout(n, ranks_per_node), used)),
        }
        for n in counts
        for size in (4096, 65536, 1 << 20, 1 << 24)
    ]
    return {
        "config": {"execution": {"reduction": reduction}},
        "ranks_per_node": ranks_per_node,
        "measured_network": rate,
        "measurements": measured,
        "allreduce": allreduce,
    }


def test_the_fit_finds_the_truth_and_predicts_what_it_has_not_seen() -> None:
    made = fit([_result(25e6, (2, 3)), _result(125e6, (2, 3))])
    for name in ("compute", "latency_between", "network_overhead", "host_per_byte", "contention"):
        assert getattr(made.parameters, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3)
    assert list(made.errors) == [f"N={n}, {rate} Mbit/s" for rate in (200, 1000) for n in (2, 3)]
    assert made.error == pytest.approx(0.0, abs=0.01)
    unseen = predict(made.parameters, made.sent, Layout(4, 1), algorithm="ring", rate=62.5e6)
    assert unseen.step == pytest.approx(_result(62.5e6, (4,))["measurements"][0]["step"], rel=1e-3)


def test_leave_one_out_does_not_use_what_it_leaves_out() -> None:
    honest, spoilt = _result(25e6, (2, 3, 4)), _result(25e6, (2, 3, 4))
    spoilt["measurements"][2]["step"] *= 2
    assert fit([honest]).errors["N=4, 200 Mbit/s"] == pytest.approx(0.0, abs=1e-3)
    assert fit([spoilt]).errors["N=4, 200 Mbit/s"] == pytest.approx(-0.5, abs=1e-3)


def test_with_one_n_nothing_can_be_left_out() -> None:
    made = fit([_result(25e6, (2,))])
    assert made.errors == {}
    assert made.error is None


def test_a_result_of_one_rank_says_nothing_of_communication() -> None:
    with pytest.raises(UserError, match="nothing was measured on several ranks"):
        fit([_result(None, ())])


def test_several_nodes_are_refused_when_nothing_between_nodes_is_known() -> None:
    options = Options(ranks=(1, 2, 4), predict=(8, 64))
    with pytest.raises(UserError, match=r"--predict: 8 ranks are 2 nodes of 4.*--network 50gbit"):
        check_forecast(options, world_size=4, measured_per_node=4)
    check_forecast(Options(ranks=(1, 4), predict=(64,), network=1e9), 4, 4)
    check_forecast(Options(ranks=(1, 8), predict=(64,)), world_size=8, measured_per_node=4)
    check_forecast(Options(ranks=(1, 2), predict=(4,)), world_size=4, measured_per_node=4)


@pytest.mark.parametrize(
    "options", [Options(ranks=(1,), predict=(8,)), Options(ranks=(1, 2), mode="strong", predict=(8,))]
)
def test_a_prediction_without_weak_scaling_over_several_ranks_is_refused_before_measuring(options: Options) -> None:
    with pytest.raises(UserError, match="nothing was measured on several ranks"):
        check_forecast(options, 8, 8)


def test_ranks_of_one_node_are_refused_when_only_nodes_were_measured() -> None:
    options = Options(ranks=(1, 2), predict=(16,), ranks_per_node=8)
    with pytest.raises(UserError, match="nothing inside a node is measured"):
        check_forecast(options, world_size=2, measured_per_node=1)


def test_a_forecast_names_what_it_assumes_of_a_network_that_was_not_measured() -> None:
    found = forecast(_result(None, (2, 3), ranks_per_node=4), Options(ranks=(2, 3), predict=(64,), network=6.25e9))
    assert [p["algorithm"] for p in found["predictions"]] == ["ring", "halving_doubling", "two_level"]
    (overhead, work, latency) = found["assumptions"]
    assert "network overhead 1.17" in overhead
    assert "0.1 ns beside the network's" in work
    assert "latency between nodes 25 µs a message, the larger of 25 µs and the 10 µs fitted" in latency
    assert all(f"assumed: {text}" in prediction_notes(found) for text in found["assumptions"])
    first = found["predictions"][0]
    assert (first["nodes"], first["global_batch"], first["baseline"]) == (16, 2048, "1 rank without DDP")
    assert first["efficiency"] == pytest.approx(0.054 / first["step"])


# What two cores with gloo gave: half a millisecond a message, 1.4 GB/s; and a node with fast links.
MACHINES = {
    "slow inside": replace(TRUTH, latency_inside=531e-6, seconds_per_byte_inside=7e-10, jitter=0.004, contention=2.1),
    "fast inside": replace(TRUTH, latency_inside=5e-6, seconds_per_byte_inside=1e-11),
}


def _steps(machine: str, ranks_per_node: int, counts: tuple[int, ...]) -> dict[tuple[str, int], float]:
    """Predicted seconds by algorithm and N, from two ranks of one node and the nominal rate of a network."""
    result = _result(None, (2,), ranks_per_node=2, truth=MACHINES[machine])
    options = Options(ranks=(2,), predict=counts, network=6.25e9, ranks_per_node=ranks_per_node)
    return {(p["algorithm"], p["world_size"]): p["step"] for p in forecast(result, options)["predictions"]}


@pytest.mark.parametrize("machine", MACHINES)
def test_no_prediction_gains_from_leaving_a_node(machine: str) -> None:
    counts = (4, 6, 8, 16, 64, 1024)
    whole = _steps(machine, 1024, counts)
    assert {algorithm for algorithm, _ in whole} == {"ring", "halving_doubling"}
    for per_node in (1, 2, 3, 4, 8):
        spread = _steps(machine, per_node, counts)
        for (algorithm, n), step in spread.items():
            # Two levels are not one algorithm on one node; what they do there halving and doubling does best.
            alone = whole["halving_doubling" if algorithm == "two_level" else algorithm, n]
            assert step >= alone * (1 - 1e-12), (algorithm, n, per_node)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("per_node", [1, 2, 3, 4, 8])
def test_no_prediction_gains_from_more_ranks(machine: str, per_node: int) -> None:
    steps = _steps(machine, per_node, (*range(2, 40), 64, 256, 1024))
    for algorithm in ALGORITHMS:
        rising = [step for (name, _), step in steps.items() if name == algorithm]
        # The images of a rank stay the same, so a longer step is a lower efficiency.
        assert all(later >= sooner * (1 - 1e-12) for sooner, later in itertools.pairwise(rising)), algorithm
        assert len(rising) > 30 or algorithm == "two_level"


def test_links_between_nodes_that_were_measured_as_cheaper_are_raised_to_those_inside() -> None:
    odd = replace(TRUTH, latency_inside=3e-4, seconds_per_byte_inside=5e-9)
    result = _result(1e9, (2, 4, 8), ranks_per_node=4, truth=odd)
    found = forecast(result, Options(ranks=(2, 4, 8), predict=(16,)))
    parameters = found["parameters"]
    assert parameters["latency_between"] == pytest.approx(3e-4, rel=1e-3)
    assert parameters["network_overhead"] / 1e9 + parameters["host_per_byte"] == pytest.approx(5e-9, rel=1e-3)
    assert "measured between nodes: 100 µs" in found["assumptions"][0]
    assert "a byte between nodes takes 5 ns" in found["assumptions"][1]


def test_the_committed_all_reduces_of_the_cluster_are_fitted_well() -> None:
    """Those of the size of its gradients, 4 MB, at N = 2 and 3 and two rates: within a few percent."""
    text = (Path(__file__).parents[1] / "results/benchmark/predict_cluster.json").read_text()
    for part in json.loads(text):
        rates = [{"measured_network": parse_rate(s["rate"], "rate"), "ranks_per_node": 1} for s in part["seen"]]
        rows = [
            (rate, a)
            for rate, s in zip(rates, part["seen"], strict=True)
            for a in s["allreduce"]
            if a["reduction"] == part["reduction"] and a["size"] in (4096, 1 << 22)
        ]
        parameters = Parameters(compute=0.0, **fit_communication(rows, part["algorithm"]))
        for rate, a in rows:
            if a["size"] > 4096:
                coefficients = messages(part["algorithm"], a["size"], Layout(a["world_size"], 1), rate_of(rate))
                assert allreduce_seconds(parameters, coefficients) == pytest.approx(a["seconds"], rel=0.15)


def test_the_papers_cluster_by_hand() -> None:
    found = paper.worked_example()
    volume = 2 * 43 / 44 * 100e6 / (50e9 / 8) * 15 / 12.8 + 2 * 7 / 8 * 100e6 / 20e9
    latency = 54 * (12 * 25e-6 + 14 * 10e-6)
    assert found.communication == pytest.approx(volume + latency)
    step = 29 * 3600 / (90 * 1_281_167 / 256)
    assert found.step_on_one_server == pytest.approx(step, rel=0.01)
    assert found.hidden.exposed_communication < 0.001
    assert found.increase_hidden < paper.REPORTED_INCREASE < found.increase_unhidden
    with_jitter = step + found.jitter_for_reported * expected_maximum(352)
    assert with_jitter / (step + found.jitter_for_reported * expected_maximum(8)) == pytest.approx(1.12, abs=0.003)


def test_resnet50s_layers_are_all_there() -> None:
    layers = paper._layers()
    assert sum(parameters for parameters, _ in layers) == 25_557_032
    assert sum(work for _, work in layers) == pytest.approx(4.09e9, rel=0.01)
    sent = paper.layer_messages()
    assert sum(message.size for message in sent) == pytest.approx(100e6)
    assert sent[-1].ready == pytest.approx(1.0)
    assert sent[0].ready == pytest.approx(1 - 0.120 / paper.STEP, abs=0.01)


def test_the_documentation_holds_what_the_model_says() -> None:
    text = (Path(__file__).parents[1] / "docs/performance_model.md").read_text()
    expected = paper.as_markdown()
    assert text.endswith(expected + "\n"), f"end docs/performance_model.md with:\n{expected}"
    for n, value in re.findall(r"m\((\d+)\) = ([\d.]+)", text):
        assert f"{expected_maximum(int(n)):.2f}" == value
