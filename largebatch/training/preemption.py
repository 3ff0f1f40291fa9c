"""Asked to stop: Slurm's SIGUSR1 before the time limit, or anybody's SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Launchers pass a signal on to processes that have got it already: one within this time is the same request.
_SAME_REQUEST_SECONDS = 5.0


class StopRequest:
    """Whether this process has been asked to stop. A second request ends the process at once."""

    def __init__(self) -> None:
        self._at: float | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._at is not None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._at is None:
            self._at = now
        elif now - self._at > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)  # as a shell counts a process that a signal ended


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, SIGTERM and SIGUSR1 ask for a stop between two steps instead of ending the process.

    Off the main thread, where Python handles no signals, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
