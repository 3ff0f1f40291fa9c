"""When a step has waited long enough for its workers: `batch.deadline`, `batch.backup_workers`."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from largebatch.distributed.counter import StepCounter
from largebatch.recipe.batch import DeadlineSettings, Deal
from largebatch.training.stragglers import Pace

_NEWEST = 5  # records of the metrics that say what is usual


class Gate(Protocol):
    """Says on each rank, by a clock or a count of its own, whether it starts a further pass of the open step."""

    def begin_step(self, step: int, deal: Deal) -> None:
        """The passes of `step` come next."""

    def pass_done(self) -> bool:
        """A pass of this rank is done; whether it may start another."""
        ...

    def learn(self, pace: Pace) -> None:
        """Take in how long the ranks took lately."""


class Deadline:
    """Closed from some time after the start of a step on."""

    def __init__(self, settings: DeadlineSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._paces: deque[float] = deque(maxlen=_NEWEST)
        self._end = 0.0

    def begin_step(self, step: int, deal: Deal) -> None:
        """See `Gate`. Until there is a record of the metrics, nothing is usual, and there is no deadline."""
        allowed = self._settings.seconds
        if self._settings.slack is not None:
            usual = statistics.median(self._paces) if self._paces else float("inf")
            allowed = (1 + self._settings.slack) * usual * max(map(len, deal.passes))
        assert allowed is not None, "the config is checked"
        self._end = self._clock() + allowed

    def pass_done(self) -> bool:
        """See `Gate`."""
        return self._clock() < self._end

    def learn(self, pace: Pace) -> None:
        """See `Gate`: the median over ranks of a pass's seconds, waiting for data included."""
        self._paces.append(statistics.median(pace.of_a_pass_with_data))


class Enough:
    """Closed from when all ranks together have done enough passes of a step (backup workers of Chen et al. 2016)."""

    def __init__(self, passes: int, counter: StepCounter) -> None:
        self._passes, self._counter, self._step = passes, counter, 0

    def begin_step(self, step: int, deal: Deal) -> None:
        """See `Gate`."""
        self._step = step
        self._counter.begin(step)

    def pass_done(self) -> bool:
        """See `Gate`."""
        return self._counter.add(self._step) < self._passes

    def learn(self, pace: Pace) -> None:
        """See `Gate`; no clock counts here."""
