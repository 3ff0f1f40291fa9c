"""What all ranks learn about each step in addition to its gradients: who asks for a stop, and whether the update was
finite."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.training.step import StepResult

STOP, SAVE, FAILED = range(3)
FLAGS = 3
"""Flags that a rank raises: asked to stop, a checkpoint is due by the clock, the last one could not be written."""


@dataclass(frozen=True)
class StepFacts:
    """One step's facts, the same on every rank except the last field."""

    step: int
    stop: bool = False
    save: bool = False
    failed: bool = False
    not_finite: bool = False
    overflowed: tuple[int, ...] = ()
    """Positions of the parameters whose sum may not be exact."""
    absent: tuple[int, ...] = ()
    """Passes that the step was left without."""
    passes_not_finite: tuple[bool, ...] = ()
    """Which of this rank's own passes had a loss that is not finite."""


class FactReader:
    """Turns each step's flags on the device into `StepFacts`, without a wait that the device would notice.

    On a CPU they are read at once; on a GPU one step later, when that step's successor is already queued. Ranks
    read at the same step, so they decide alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._lag = 1 if device.type == "cuda" else 0
        self._pending: deque[tuple[int, Tensor, Tensor, int, torch.cuda.Event | None]] = deque()

    def read(self, step: int, result: StepResult) -> StepFacts:
        """Take in the facts of `step`; returns the newest that are due."""
        overflowed = result.overflowed
        parts = [result.flags > 0, result.not_finite, overflowed.any(), result.arrived, result.passes_not_finite]
        packed = torch.cat([part.reshape(-1) for part in parts])
        event = None
        if packed.is_cuda:
            packed = packed.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, packed, overflowed, len(result.arrived), event))
        return self._oldest() if len(self._pending) > self._lag else StepFacts(step=-1)

    def rest(self) -> Iterator[StepFacts]:
        """The facts of the steps that are not read yet; waits for the device."""
        while self._pending:
            yield self._oldest()

    def _oldest(self) -> StepFacts:
        step, packed, overflowed, passes, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        stop, save, failed, bad, any_overflow, *here = packed.tolist()
        positions = tuple(overflowed.nonzero().flatten().tolist()) if any_overflow else ()  # rare, so may wait
        absent = tuple(leaf for leaf, arrived in enumerate(here[:passes]) if not arrived)
        return StepFacts(step, stop, save, failed, bad, positions, absent, tuple(here[passes:]))


def flags_on(device: torch.device, *, stop: bool, save: bool, failed: bool) -> Tensor:
    """This rank's flags as a tensor, float32 [FLAGS]."""
    return torch.tensor([stop, save, failed], dtype=torch.float32).to(device, non_blocking=True)
