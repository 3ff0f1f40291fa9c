"""Fits the performance model to one or several `benchmark.json`, and says how well it predicts what it has not
seen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize

from largebatch.benchmark.performance import (
    COMMUNICATION,
    Layout,
    Message,
    Parameters,
    messages,
    predict,
)
from largebatch.errors import UserError

ALGORITHM = "ring"
"""How the all-reduce is modelled: gloo's all-reduce is a ring, and NCCL's over one buffer behaves as one."""
NOTHING_MEASURED = (
    "--predict: nothing was measured on several ranks in weak scaling, so communication is unknown; use --mode "
    "weak or both, and --ranks with at least one N above 1"
)
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A measured step, and the result that it is part of."""

    result: Result
    measurement: Mapping[str, Any]

    @property
    def layout(self) -> Layout:
        return Layout(self.measurement["world_size"], self.result["ranks_per_node"])


@dataclass(frozen=True)
class Fit:
    """The model of one training."""

    parameters: Parameters
    sent: list[Message]
    algorithm: str
    reference: Point
    """Whose compute and messages are used: the largest N."""
    errors: dict[str, float]
    """Leave-one-out: what is predicted of each measured step by a fit to the others, over the step, less 1."""

    @property
    def error(self) -> float | None:
        """The largest of `errors`, None if there are none."""
        return max(map(abs, self.errors.values()), default=None)


def rate_of(result: Result) -> float:
    """The nominal rate between the measured nodes; 1 byte a second if unknown, so that overhead takes its place."""
    return float(result.get("measured_network") or 1.0)


def fit(results: Sequence[Result]) -> Fit:
    """Fit weak scaling. Raises UserError if none was measured with several ranks."""
    points = [Point(r, m) for r in results for m in r["measurements"] if m["mode"] == "weak" and m["world_size"] > 1]
    if not points:
        raise UserError(NOTHING_MEASURED)
    reductions = {result["config"]["execution"]["reduction"] for result in results}
    assert len(reductions) == 1, "one fit is of one reduction"
    reduction = reductions.pop()
    rows = [(r, a) for r in results for a in r["allreduce"] if a["reduction"] == reduction]
    made = _fit(points, rows, ALGORITHM)
    return replace(made, errors=_leave_one_out(points, rows, ALGORITHM))


def _leave_one_out(points: list[Point], rows: list[tuple[Result, Any]], algorithm: str) -> dict[str, float]:
    errors = {}
    for point in points:
        n = point.measurement["world_size"]
        others = [other for other in points if other is not point]
        other_rows = [(r, a) for r, a in rows if r is not point.result or a["world_size"] != n]
        if not others or not _covers(other_rows, point):
            continue
        made = _fit(others, other_rows, algorithm)
        predicted = predict(
            made.parameters, made.sent, point.layout, algorithm=algorithm, rate=rate_of(point.result)
        ).step
        rate = f", {8e-6 * rate_of(point.result):g} Mbit/s" if point.result.get("measured_network") else ""
        errors[f"N={n}{rate}"] = predicted / point.measurement["step"] - 1
    return errors


def _covers(rows: list[tuple[Result, Any]], point: Point) -> bool:
    """Whether the rows say something of the links that `point` uses."""
    seen = [Layout(a["world_size"], r["ranks_per_node"]) for r, a in rows]
    inside = point.layout.on_node == 1 or any(layout.on_node > 1 for layout in seen)
    between = point.layout.nodes == 1 or any(layout.nodes > 1 for layout in seen)
    return inside and between


def _fit(points: list[Point], rows: list[tuple[Result, Any]], algorithm: str) -> Fit:
    reference = max(points, key=lambda point: point.measurement["world_size"])
    measured = reference.measurement
    compute, jitter = _fit_compute([p.measurement for p in points if p.layout == reference.layout])
    parameters = Parameters(
        compute=compute,
        jitter=jitter,
        # Neither depends on N, and each is a small difference of large times: all points together.
        other=max(0.0, statistics.median(p.measurement["other"] for p in points)),
        data_wait=max(0.0, statistics.median(p.measurement["data_wait"] for p in points)),
        **fit_communication(_of_like_size(rows, measured["buckets"]), algorithm),
    )
    sent = [Message(b["size"], b["ready"] / measured["replay_seconds"]) for b in measured["buckets"]]
    contention = _fit_contention(parameters, sent, points, algorithm)
    return Fit(replace(parameters, contention=contention), sent, algorithm, reference, errors={})


def _of_like_size(rows: list[tuple[Result, Any]], buckets: Sequence[Mapping[str, Any]]) -> list[tuple[Result, Any]]:
    """The all-reduces about as large as most of the step's bytes or larger, and the smallest, for the latency.

    Libraries change their way with the size, and switches let a burst pass: what is true of 64 KiB is not of 25 MB.
    """
    half, seen = sum(bucket["size"] for bucket in buckets) / 2, 0
    for size in sorted((bucket["size"] for bucket in buckets), reverse=True):
        seen += size
        if seen >= half:
            break
    sizes = {a["size"] for _, a in rows}
    used = {s for s in sizes if s >= size / 4} or {max(sizes)}
    return [(r, a) for r, a in rows if a["size"] in used | {min(sizes)}]


def _fit_compute(measured: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean and standard deviation of a rank's own compute.

    The mean is that of the windows' medians, which resist single slow steps; the jitter is kept in proportion.
    """
    steps = [seconds for m in measured for by_rank in m["compute_steps_by_rank"] for seconds in by_rank]
    mean = statistics.fmean(seconds for m in measured for seconds in m["compute_by_rank"])
    return mean, statistics.stdev(steps) * mean / statistics.fmean(steps)


def fit_communication(rows: Sequence[tuple[Result, Mapping[str, Any]]], algorithm: str) -> dict[str, float]:
    """The `COMMUNICATION` parameters that make the smallest relative errors over all measured all-reduces."""
    coefficients = [
        messages(algorithm, a["size"], Layout(a["world_size"], r["ranks_per_node"]), rate_of(r)) for r, a in rows
    ]
    seconds = np.array([a["seconds"] for _, a in rows])
    # With one nominal rate the two costs of a byte between nodes cannot be separated.
    names = [name for name in COMMUNICATION if name != "host_per_byte" or len({rate_of(r) for r, _ in rows}) > 1]
    matrix = np.array([[c[name] for name in names] for c in coefficients]).reshape(len(rows), len(names))
    solution = nonnegative_least_squares(matrix / seconds[:, None], np.ones(len(rows)))
    return dict(zip(names, solution.tolist(), strict=True))


def nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 [columns] with the least |matrix x - target|; 0 where a column says nothing."""
    # Seconds of a message and of a byte differ by six orders of magnitude: columns of one length.
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    return optimize.nnls(matrix / scale, target)[0] / scale


def _fit_contention(parameters: Parameters, sent: list[Message], points: list[Point], algorithm: str) -> float:
    """What the measured steps take beyond the expected, over the communication hidden; least squares, at least 0."""
    left, hidden = [], []
    for point in points:
        expected = predict(parameters, sent, point.layout, algorithm=algorithm, rate=rate_of(point.result))
        left.append(point.measurement["step"] - expected.step)
        hidden.append(expected.communication - expected.exposed_communication)
    square = sum(h * h for h in hidden)
    return max(0.0, sum(a * h for a, h in zip(left, hidden, strict=True)) / square) if square else 0.0
