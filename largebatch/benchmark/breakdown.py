"""From raw windows to where a step's time goes: pure arithmetic."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SLACK = 0.05  # how far a value may be beyond what is possible, relative to the whole
PARTS = ("compute", "exposed_communication", "data_wait", "other")
# Each part is what its window has more than another window of the same round.
_DIFFERENCES = {
    "compute": ("compute", None),
    "other": ("update", "compute"),
    "exposed_communication": ("exchange", "update"),
    "data_wait": ("whole", "exchange"),
}


@dataclass(frozen=True)
class Window:
    """Some steps of one kind, run in one go."""

    round: int
    kind: str
    steps: int
    seconds: tuple[float, ...]
    """Of one step, on each rank."""

    @property
    def slowest(self) -> float:
        """Seconds of a step on the slowest rank, for which all others wait."""
        return max(self.seconds)


@dataclass(frozen=True)
class Breakdown:
    """Medians over the rounds, in seconds of a step, with the spread of each (the interquartile range)."""

    step: float
    parts: dict[str, float]
    """What the difference of paired windows gives: below zero where noise is larger than the part."""
    spread: dict[str, float]
    compute_by_rank: list[float]
    slowest_rank: int

    @property
    def closure(self) -> float:
        """The parts' sum over the step, less 1."""
        return sum(self.parts.values()) / self.step - 1


def break_down(windows: Sequence[Window]) -> Breakdown:
    """The breakdown of one case. Without windows of kind "exchange" there is nothing to exchange."""
    rounds = by_round(windows)
    exchanges = any("exchange" in kinds for kinds in rounds)
    values: dict[str, list[float]] = {"step": [kinds["whole"].slowest for kinds in rounds]}
    for part, (with_it, without) in _DIFFERENCES.items():
        values[part] = [_difference(kinds, with_it, without, exchanges) for kinds in rounds]
    own = zip(*[kinds["compute"].seconds for kinds in rounds], strict=True)
    compute_by_rank = [statistics.median(seconds) for seconds in own]
    return Breakdown(
        step=statistics.median(values["step"]),
        parts={part: statistics.median(values[part]) for part in PARTS},
        spread={name: interquartile_range(found) for name, found in values.items()},
        compute_by_rank=compute_by_rank,
        slowest_rank=compute_by_rank.index(max(compute_by_rank)),
    )


def by_round(windows: Sequence[Window]) -> list[dict[str, Window]]:
    """The windows of each round, by their kind."""
    rounds: dict[int, dict[str, Window]] = {}
    for window in windows:
        rounds.setdefault(window.round, {})[window.kind] = window
    return [rounds[number] for number in sorted(rounds)]


def _difference(kinds: Mapping[str, Window], with_it: str, without: str | None, exchanges: bool) -> float:
    if not exchanges:
        if with_it == "exchange":
            return 0.0
        without = "update" if without == "exchange" else without
    return kinds[with_it].slowest - (kinds[without].slowest if without else 0.0)


def interquartile_range(values: Sequence[float]) -> float:
    """The width of the middle half; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return quartiles[2] - quartiles[0]


def clearly_above_zero(differences: Sequence[float]) -> bool:
    """Whether paired rounds show a gain beyond noise, for one of about ten settings tried together.

    The median is above the whole interquartile range, and nine of ten rounds are above 0. Of ten settings that all
    change nothing, some passes in 4 % of trials with seven rounds of normal noise; with half the range alone it would
    be 55 %. Fewer than five rounds show nothing.
    """
    rounds, losses = len(differences), sum(difference <= 0 for difference in differences)
    clear = statistics.median(differences) > interquartile_range(differences)
    return rounds >= 5 and clear and losses <= rounds // 10


@dataclass(frozen=True)
class Efficiency:
    """Images a second of each rank, over that of the baseline."""

    baseline: str
    value: float
    spread: float


def efficiency(
    name: str, windows: Sequence[Window], images_per_rank: float, base: Sequence[Window], base_images_per_rank: float
) -> Efficiency:
    """Median over the rounds of each round's own ratio, so that a drift of the machine cancels.

    Weak scaling: the images of a rank are the same; strong scaling: the minibatch is. One formula serves both.
    """
    ratios = [
        (images_per_rank / kinds["whole"].slowest) / (base_images_per_rank / base_kinds["whole"].slowest)
        for kinds, base_kinds in zip(by_round(windows), by_round(base), strict=True)
    ]
    return Efficiency(name, statistics.median(ratios), interquartile_range(ratios))


def noise_in(measurement: Mapping[str, Any]) -> list[str]:
    """What in a measurement of `benchmark.json` is impossible, so noise of the machine; empty if nothing is.

    More ranks cannot be faster, each, than fewer, and no part of a step takes less than no time; a little beyond is
    what rounds differ by.
    """
    impossible = [
        f"{part.replace('_', ' ')} {1000 * measurement[part]:.2f} ms, below zero"
        for part in PARTS
        if measurement[part] < -_SLACK * measurement["step"]
    ]
    impossible += [
        f"efficiency {100 * known['value']:.0f} % vs {name}, above 100 %"
        for name, known in measurement["efficiencies"].items()
        if known["value"] > 1 + _SLACK and measurement["world_size"] > _ranks_of(name)
    ]
    if abs(measurement["closure"]) > 2 * _SLACK:
        impossible.append(f"parts that sum to {100 * (1 + measurement['closure']):.0f} % of the step")
    return impossible


def _ranks_of(baseline: str) -> int:
    """The ranks of a baseline by its name: 3 for "1 node of 3 ranks"."""
    return max(int(number) for number in re.findall(r"\d+", baseline))


def windows_as_json(windows: Sequence[Window]) -> list[dict[str, Any]]:
    """Plain values for `benchmark.json`."""
    return [{"round": w.round, "kind": w.kind, "steps": w.steps, "seconds_by_rank": list(w.seconds)} for w in windows]
