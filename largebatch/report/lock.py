"""One process at a time writes in a run folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from largebatch.errors import UserError

# A process that was just killed, or has lost its launcher, may take this long to let go.
_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.2


@contextlib.contextmanager
def hold_folder(folder: Path, patience_seconds: float = _PATIENCE_SECONDS) -> Iterator[None]:
    """Inside, no other process holds `folder`. Raises UserError if one does for longer than the patience.

    The system lets go when the process ends, however it ends. Where the file system knows no locks (some network
    file systems), no one is kept out.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _wait(descriptor, folder, time.monotonic() + patience_seconds)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, folder: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"--run-dir: another process is training in {folder}; wait for it, stop it, or choose another folder"
            )
        time.sleep(_POLL_SECONDS)
