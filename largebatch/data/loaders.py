"""Processes that decode images for a rank, and inherit nothing of it: no signal handler, no lock, no thread."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker as resource_tracker
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.popen_forkserver import Popen
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from largebatch.errors import DataError

_log = logging.getLogger(__name__)
_SHM = Path("/dev/shm")
_ENOUGH_DESCRIPTORS = 1024
_FEW_DESCRIPTORS = 256
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


class _Popen(Popen):
    """A process that blocks the signals by which it would usually be asked to end."""

    def terminate(self) -> None:
        self.kill()


class _Process(BaseProcess):
    _start_method = "forkserver"

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:
        return _Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Process  # type: ignore[assignment]


_context = _Context()


def make_loader(
    decoder: Any,
    sampler: Iterable[Any],
    *,
    processes: int,
    prefetch: int,
    pass_bytes: int,
    where: str,
    keep: bool,
    pin: bool,
) -> DataLoader:
    """A DataLoader that gives ``decoder[item]`` for each item of `sampler`, in order.

    `pass_bytes` is the size of one such result; `where` names the data in messages. With `keep` its processes stay for
    the next time that it is iterated over, and as shared memory may be scarce by then, fewer results are kept ready;
    with `pin` results lie in pinned memory. Raises DataError if the processes cannot be had.
    """
    if processes:
        processes = _affordable(processes)
    if processes and keep:
        processes, prefetch = _that_fit(pass_bytes, processes, prefetch)
    if processes:
        _check_shared_memory(pass_bytes * processes * prefetch)
        _check_pickles(decoder, where)
        _start_server()
    return DataLoader(
        decoder,
        sampler=sampler,
        batch_size=None,
        num_workers=processes,
        prefetch_factor=prefetch if processes else None,
        pin_memory=pin,
        generator=torch.Generator(),  # else DataLoader takes a number from torch's global generator
        multiprocessing_context=_context if processes else None,
        persistent_workers=keep and processes > 0,
        worker_init_fn=_begin,
    )


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Inside, processes are started: with the stop signals blocked, and without the user's script.

    A child of the server imports the main module again, which a script without ``if __name__ == "__main__"`` would not
    survive; what is decoded here never needs it.
    """
    main = sys.modules["__main__"]
    kept: dict[str, Any] = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    vars(main).pop("__file__", None)
    try:
        with _stop_signals_blocked():
            yield
    finally:
        vars(main).update(kept)


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(_: int) -> None:
    """What a loader process does first."""
    # Where the server is not ours (a run of `reproduce`, or the user's own program), they are not blocked yet.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    threading.Thread(target=_end_with_rank, name="end with rank", daemon=True).start()


def _end_with_rank() -> None:
    """End this process when its rank is gone, however it went.

    DataLoader's own watch compares the parent's process id, which here is the server's; and the server lives as long
    as one of its children, so all of them would stay for ever.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None, "loaders are started by multiprocessing"
    multiprocessing.connection.wait([rank.sentinel])
    os._exit(1)


def _start_server() -> None:
    """Start the process that all loaders are forked from, if it is not there yet.

    Forked from this process, a loader would inherit its handlers and threads' locks: it could hang, and a signal sent
    to it would reach us. torchrun signals whole process groups; a loader that ended on it would take the stop's
    checkpoint with it, so the server and all its children have those signals blocked and end with their rank.
    """
    multiprocessing.forkserver.set_forkserver_preload([__name__, "largebatch.data.files"])
    resource_tracker.ensure_running()  # first, since starting it would unblock the signals
    with _stop_signals_blocked():
        multiprocessing.forkserver.ensure_running()


def _affordable(processes: int) -> int:
    """`processes`, or 0 where the system gives them no shared memory or too few file descriptors; said once."""
    why = ""
    if _SHM.exists() and not os.access(_SHM, os.W_OK):
        why = f"{_SHM} is not writable"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _ENOUGH_DESCRIPTORS:
        soft = _ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < _FEW_DESCRIPTORS:
        why = f"this process may open {soft} files at most (ulimit -n)"
    if not why:
        return processes
    _log.warning("warning: %s, so images are decoded in the training process (data.loader_processes: 0), slower", why)
    return 0


def _ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)


def _that_fit(pass_bytes: int, processes: int, prefetch: int) -> tuple[int, int]:
    """As many processes and results kept ready as half of the free shared memory holds; no process if it holds none.

    Nobody wants a run to stop at its first evaluation, hours after its start.
    """
    if not _SHM.exists() or not pass_bytes:
        return processes, prefetch
    results = shutil.disk_usage(_SHM).free // (2 * _ranks_here() * pass_bytes)
    if results >= processes * prefetch:
        return processes, prefetch
    processes = min(processes, results)
    return processes, max(1, results // max(1, processes))


def _check_shared_memory(needed: int) -> None:
    """Raise DataError if what all ranks of this machine keep ready cannot fit; a late one sees less that is free."""
    ranks = _ranks_here()
    if not _SHM.exists():
        return
    total, _, free = shutil.disk_usage(_SHM)
    if needed > free or needed * ranks > total:
        raise DataError(
            f"{_SHM} has {free / 2**20:.0f} MiB free, and what loader processes keep ready takes "
            f"{needed * ranks / 2**20:.0f} MiB: lower data.loader_processes or data.prefetch, or give the container "
            "more --shm-size"
        )


def _check_pickles(decoder: Any, where: str) -> None:
    try:
        if b"__main__" in pickle.dumps(decoder):
            raise TypeError("its class is defined in __main__, which a loader process does not have")
    except Exception as error:
        raise DataError(
            f"{where}: the dataset cannot be sent to a loader process ({type(error).__name__}: {error}); define it at "
            "the top of a module and keep no open file or lambda in it, or set data.loader_processes=0"
        ) from None
