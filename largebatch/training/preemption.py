"""Requests to stop: Slurm's SIGUSR1 before the time limit, a SIGTERM, or the death of torchrun's agent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Launchers pass a signal on to processes that have got it already: one within this time is the same request.
_SAME_REQUEST_SECONDS = 5.0


class StopRequest:
    """Whether this process has been asked to stop. A second request ends the process at once."""

    def __init__(self, *, launcher: int | None = None) -> None:
        """That the parent process `launcher` (a process id) has died is a request too."""
        self._at: float | None = None
        self._launcher = launcher

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived, or no one is left who could send one."""
        return self._at is not None or (self._launcher is not None and os.getppid() != self._launcher)

    def _listen(self, numbers: socket.socket) -> None:
        """Take the numbers of signals that come, until there can be no more."""
        while received := numbers.recv(1):
            number, now = received[0], time.monotonic()
            if number not in _SIGNALS:
                continue
            if self._at is None:
                self._at = now
            elif now - self._at > _SAME_REQUEST_SECONDS:
                os._exit(128 + number)  # as a shell counts a process that a signal ended


@contextlib.contextmanager
def stop_on_signals(*, launcher: int | None = None) -> Iterator[StopRequest]:
    """Inside, SIGTERM and SIGUSR1 ask for a stop between two steps instead of ending the process.

    Off the main thread, where Python handles no signals, nothing changes.
    """
    request = StopRequest(launcher=launcher)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # A handler of Python's would wait for the main thread, which may wait for a rank that hangs. What arrives here
    # is written by the system's own handler, and a thread reads it.
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=request._listen, args=(receiver,), name="signals", daemon=True).start()
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield request
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        sender.close()  # ends the thread
