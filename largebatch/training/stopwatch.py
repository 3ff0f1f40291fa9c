"""How long a rank computes for itself: forward and backward, less any wait for data or for other ranks."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch


class Stopwatch(Protocol):
    """Adds up the time that it runs. To go while it runs, or to pause while it does not, changes nothing."""

    running: bool

    def go(self) -> None: ...

    def pause(self) -> None: ...

    def read(self) -> float:
        """Seconds since the last reading. May wait for the device."""
        ...


class HostStopwatch:
    """For CPUs, where a call returns when its work is done."""

    def __init__(self) -> None:
        self.running = False
        self._since = 0.0
        self._seconds = 0.0

    def go(self) -> None:
        if not self.running:
            self.running = True
            self._since = time.perf_counter()

    def pause(self) -> None:
        if self.running:
            self.running = False
            self._seconds += time.perf_counter() - self._since

    def read(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class CudaStopwatch:
    """For GPUs: events in the stream that computes. The host never waits for them but in `read`."""

    def __init__(self) -> None:
        self.running = False
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._began = _event()
        self._seconds = 0.0

    def go(self) -> None:
        if not self.running:
            self.running = True
            self._collect()
            self._began = _event()
            self._began.record()

    def pause(self) -> None:
        if self.running:
            self.running = False
            ended = _event()
            ended.record()
            self._pairs.append((self._began, ended))

    def read(self) -> float:
        if self._pairs:
            self._pairs[-1][1].synchronize()
        self._collect()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _collect(self) -> None:
        """Add up what the device has passed, so that few events are alive however seldom anybody reads."""
        while self._pairs and self._pairs[0][1].query():
            began, ended = self._pairs.popleft()
            self._seconds += began.elapsed_time(ended) / 1000


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def make_stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch of `device`, paused."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()
