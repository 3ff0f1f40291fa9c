"""Means, spreads, and Welch's test: is a difference between two rows more than the seeds explain?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Sample:
    """What is known of some independent values."""

    mean: float
    std: float | None
    """Sample standard deviation (n - 1); None for a single value."""
    n: int


@dataclass(frozen=True)
class Welch:
    """Welch's test of two samples with unequal variances."""

    difference: float
    """Mean of the second minus mean of the first."""
    t: float
    degrees: float
    """Degrees of freedom by Welch and Satterthwaite."""
    p: float
    """Two-sided probability of a difference at least as large if the means were the same."""

    @property
    def direction(self) -> int:
        """1 if the second is higher, -1 if it is lower, 0 if the difference is not significant."""
        return 0 if self.p >= SIGNIFICANT else int(math.copysign(1, self.difference))


def sample(values: Sequence[float]) -> Sample | None:
    """Mean and standard deviation of `values`; None if there are none."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Sample(mean, None, 1)
    return Sample(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values))


def welch(first: Sample | None, second: Sample | None) -> Welch | None:
    """Welch's test; None if either has no spread to judge by (fewer than two values, or all of them the same)."""
    if first is None or second is None or first.std is None or second.std is None:
        return None
    parts = [s.std**2 / s.n for s in (first, second) if s.std is not None]
    variance = sum(parts)
    if variance == 0:
        return None
    difference = second.mean - first.mean
    t = difference / math.sqrt(variance)
    degrees = variance**2 / sum(part**2 / (s.n - 1) for part, s in zip(parts, (first, second), strict=True))
    return Welch(difference, t, degrees, two_sided_p(t, degrees))


def two_sided_p(t: float, degrees: float) -> float:
    """P(|T| >= |t|) for Student's t with (not necessarily whole) `degrees` of freedom."""
    return float(2 * special.stdtr(degrees, -abs(t)))
