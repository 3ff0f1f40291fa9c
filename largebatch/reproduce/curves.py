"""Training curves of runs, and the paper's early sign: a large minibatch's curve leaves the reference's (§5)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.report.metrics import read_metrics
from largebatch.reproduce.statistics import Sample, sample

Curve = list[float | None]
"""One value a bin; None where there was none, or it was not finite."""
_STDS_BEYOND_NOISE = 2.0


def read_curve(run_dir: Path, metric: str, every_steps: int, steps: int) -> Curve:
    """`metric` of a run in bins of `every_steps` updates, each the mean over the updates in it.

    A record holds a mean over the steps since the one before; it counts in the bin in which it ends.
    """
    sums = [0.0] * math.ceil(steps / every_steps)
    counts = [0] * len(sums)
    before = 0
    for record in read_metrics(run_dir):
        done = int(record["step"]) - before
        before = int(record["step"])
        index = min((before - 1) // every_steps, len(sums) - 1)
        value = record.get(metric)
        sums[index] += done * (math.nan if value is None else value)
        counts[index] += done
    means = [total / count if count else math.nan for total, count in zip(sums, counts, strict=True)]
    return [mean if math.isfinite(mean) else None for mean in means]


def over_seeds(curves: Sequence[Curve]) -> list[Sample | None]:
    """Mean and spread of each bin; None where a seed has no value."""
    columns = zip(*curves, strict=True) if curves else iter(())
    return [sample([v for v in column if v is not None]) if None not in column else None for column in columns]


@dataclass(frozen=True)
class EarlySign:
    """How a row's training curve lies to the reference's, after the warmup."""

    epochs: int
    """Epochs that were compared."""
    above: int
    """Epochs at which the row is higher than the reference by more than noise."""
    noise: float
    """The median over the epochs of what counts as noise at one: two standard deviations of the difference of two runs.
    Each epoch has its own, since early ones of a large learning rate are far noisier than late ones."""
    left: bool
    """Whether it left the reference's curve: above noise in most of the epochs."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"epochs": self.epochs, "above": self.above, "noise": self.noise, "left": self.left}


def early_sign(row: Sequence[Curve], reference: Sequence[Curve], first_epoch: int) -> EarlySign | None:
    """Compare two rows' curves (one for each seed, a value an epoch) from `first_epoch` on.

    None without at least two seeds in each, or where the curves have no epochs in common to compare.
    """
    pairs = list(zip(over_seeds(row), over_seeds(reference), strict=False))[first_epoch:]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    spreads = [(a.std, b.std) for a, b in whole]
    noise = [_STDS_BEYOND_NOISE * math.hypot(r, s) for r, s in spreads if r is not None and s is not None]
    if not noise or len(noise) < len(whole):
        return None
    above = sum(a.mean - b.mean > limit for (a, b), limit in zip(whole, noise, strict=True))
    return EarlySign(len(whole), above, statistics.median(noise), 2 * above > len(whole))


def describe_sign(sign: Mapping[str, Any], other: str) -> str:
    """The sign in words; `other` is the curve that was compared with."""
    seen = f"{sign['above']} of {sign['epochs']} epochs above noise (median {sign['noise']:.2f})"
    return f"leaves {other}: {seen}" if sign["left"] else f"matches {other}: {seen}"
