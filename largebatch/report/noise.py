"""The gradient noise scale of a run, from the records that it left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.errors import DataError
from largebatch.report.metrics import read_metrics


@dataclass(frozen=True)
class NoiseScale:
    """An average over the steps `first_step` to `last_step` (updates done)."""

    noise: float
    """tr(Σ): the variance of one image's gradient, summed over parameters."""
    squared_norm: float
    """|G|²: the squared norm of the true gradient."""
    first_step: int
    last_step: int

    @property
    def images(self) -> float | None:
        """B_simple = tr(Σ) / |G|², in images; None where noise hides the gradient altogether."""
        return self.noise / self.squared_norm if self.squared_norm > 0 and self.noise > 0 else None


def read_noise_scale(run_dir: Path) -> tuple[NoiseScale, list[NoiseScale]]:
    """The noise scale of a whole run, and of its thirds. Raises DataError if the run did not measure it."""
    weighted = []
    before = 0
    for record in read_metrics(run_dir):
        if record.get("gradient_noise") is not None:
            weighted.append((record["step"] - before, record))
        before = record["step"]
    if not weighted:
        raise DataError(
            f"{run_dir}: its metrics hold no gradient noise scale; train with logging.noise_scale_every_steps=10"
        )
    last = weighted[-1][1]["step"]
    thirds = [[w for w in weighted if i * last < 3 * w[1]["step"] <= (i + 1) * last] for i in range(3)]
    return _average(weighted), [_average(third) for third in thirds if third]


def _average(weighted: Sequence[tuple[int, dict[str, Any]]]) -> NoiseScale:
    """Both parts are averaged before they are divided; a quotient's average would be biased."""
    steps = sum(count for count, _ in weighted)
    noise = math.fsum(count * record["gradient_noise"] for count, record in weighted) / steps
    squared_norm = math.fsum(count * record["gradient_squared_norm"] for count, record in weighted) / steps
    return NoiseScale(noise, squared_norm, weighted[0][1]["step"] - weighted[0][0], weighted[-1][1]["step"])
