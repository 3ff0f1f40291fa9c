"""When a collective fails: which ranks no longer answer?"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

from largebatch.distributed.environment import Ranks
from largebatch.distributed.heartbeat import RESTART, VERDICT, failed_key
from largebatch.errors import RanksLost

T = TypeVar("T")

_PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.05
# The last is what DDP makes of a bucket's future that has failed.
_MARKS = ("gloo", "nccl", "connection", "timed out", "pair closure", "unable to cast")


@contextlib.contextmanager
def name_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """Inside, a collective that fails because of other ranks raises RanksLost, which names them.

    Every rank that sees a failure says so in the store; those that have not within seconds are the ones that
    died or hang. A rank that fails by an error of its own leaves it there for the others to quote.
    """
    if ranks.store is None:
        yield
        return
    try:
        yield
    except Exception as error:
        if not ranks.whereabouts.leaving.acquire(blocking=False):
            threading.Event().wait()  # another thread has said why, and ends the process
        store, own = ranks.store, "" if _is_collective_failure(error) else f"{type(error).__name__}: {error}"
        _within(_PATIENCE_SECONDS, lambda: store.set(failed_key(ranks.rank), own.partition("\n")[0]))
        if not _is_collective_failure(error):
            raise
        raise RanksLost(_explain(ranks, store, error)) from error


def _is_collective_failure(error: Exception) -> bool:
    """Whether `error` came from the communication with other ranks, not from this rank's own work."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in text for mark in _MARKS)
    )


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What `ask` returns; None if the store, whose host may be gone or stopped, does not answer in time."""
    found: list[T] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _explain(ranks: Ranks, store: dist.Store, error: Exception) -> str:
    reason = _within(2 * _PATIENCE_SECONDS, lambda: _ask(ranks, store)) or f"rank 0 died or hung. {RESTART}"
    return f"{reason} ({str(error).splitlines()[0][:200]})"


def _ask(ranks: Ranks, store: dist.Store) -> str:
    """What all ranks leave with; else the ranks that have said nothing within the patience, and what those said that
    failed by themselves."""
    causes: list[str] = []
    missing = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        while missing and time.monotonic() < deadline:
            if store.check([VERDICT]):
                return store.get(VERDICT).decode()
            for rank in [rank for rank in missing if store.check([failed_key(rank)])]:
                missing.remove(rank)
                cause = store.get(failed_key(rank)).decode()
                causes += [f"rank {rank} failed: {cause}"] if cause else []
            time.sleep(_POLL_SECONDS)
    except RuntimeError:  # the store is gone, and the rank that held it
        missing = [0]
    # Who failed by an error of its own explains the silence of those that waited for it.
    lost = f"{_ranks(missing)} died or hung" if missing and not causes else ""
    return f"{'; '.join(filter(None, [lost, *causes])) or 'the connection between the ranks broke'}. {RESTART}"


def _ranks(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"
