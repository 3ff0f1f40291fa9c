"""Times of a step's parts, on a device that may run behind the host."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Clock(Protocol):
    """Marks in the order of the device's own work; read once it is idle."""

    def mark(self) -> None: ...

    def read(self) -> list[float]:
        """Seconds from the first mark to each of them; forgets them. Waits for the device."""
        ...


class HostClock:
    """For CPUs, where a call returns when its work is done."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def read(self) -> list[float]:
        marks, self._marks = self._marks, []
        return [mark - marks[0] for mark in marks]


class CudaClock:
    """Events in the current stream: they complete when the work before them is done; the host does not wait."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def read(self) -> list[float]:
        marks, self._marks = self._marks, []
        torch.cuda.synchronize()
        return [marks[0].elapsed_time(mark) / 1000 for mark in marks]


def make_clock(device: torch.device) -> Clock:
    """The clock of `device`."""
    return CudaClock() if device.type == "cuda" else HostClock()
