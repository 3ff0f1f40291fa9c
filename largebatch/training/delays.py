"""Sleeps that make ranks slow on purpose, to rehearse what `docs/stragglers.md` describes."""

from __future__ import annotations

import statistics
import time

import numpy as np

from largebatch.recipe.draws import uniform
from largebatch.training.settings import DelaySettings

_RARE, _JITTER = 5, 6  # keep these draws apart from those of dropout


class Delays:
    """What a rank sleeps in each of its passes: a function of (rank, step, pass), the same in every run."""

    def __init__(self, settings: DelaySettings, rank: int) -> None:
        self._settings, self._rank = settings, rank

    def seconds(self, step: int, leaf: int) -> float:
        """The sleep of pass `leaf` of `step`."""
        delays, at = self._settings, np.array([leaf])
        seconds = delays.seconds * (delays.slow_factor if self._rank in delays.slow_ranks else 1.0)
        if uniform(at * 0, _RARE, self._rank, step)[0] < delays.rare_share:
            seconds *= delays.rare_factor
        if delays.jitter:
            drawn = float(uniform(at, _JITTER, self._rank, step)[0])
            seconds *= max(0.0, 1 + delays.jitter * statistics.NormalDist().inv_cdf(max(drawn, 1e-12)))
        return seconds

    def sleep(self, step: int, leaf: int) -> None:
        """Make pass `leaf` of `step` last longer."""
        time.sleep(self.seconds(step, leaf))
