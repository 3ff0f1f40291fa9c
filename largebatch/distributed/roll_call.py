"""When a collective fails: who does not answer any more?"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from largebatch.distributed.environment import Ranks
from largebatch.errors import RanksLost

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
    if ranks.world_size == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # the store may be gone with the rank that holds it
            _say(ranks, error)
        if not _is_collective_failure(error):
            raise
        raise RanksLost(_explain(ranks, error)) from error


def _is_collective_failure(error: Exception) -> bool:
    """Whether `error` came from the communication with other ranks, not from this rank's own work."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in text for mark in _MARKS)
    )


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _key(rank: int) -> str:
    return f"largebatch/failed/{rank}"


def _say(ranks: Ranks, error: Exception) -> None:
    own = "" if _is_collective_failure(error) else f"{type(error).__name__}: {error}".splitlines()[0]
    _store().set(_key(ranks.rank), own)


def _explain(ranks: Ranks, error: Exception) -> str:
    found: list[tuple[list[int], list[str]]] = []
    # A store whose host is stopped may not even time out.
    asking = threading.Thread(target=lambda: found.append(_ask(ranks)), daemon=True)
    asking.start()
    asking.join(2 * _PATIENCE_SECONDS)
    missing, causes = found[0] if found else ([0], [])
    # Who failed by an error of its own explains the silence of those that waited for it.
    lost = f"{_ranks(missing)} died or hung" if missing and not causes else ""
    reason = "; ".join(filter(None, [lost, *causes])) or "the connection between the ranks broke"
    return (
        f"{reason}. Start the same command again: the run goes on from its newest checkpoint "
        f"({str(error).splitlines()[0][:200]})"
    )


def _ask(ranks: Ranks) -> tuple[list[int], list[str]]:
    """The ranks that have said nothing within the patience, and what those said that failed by themselves."""
    causes: list[str] = []
    missing = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        while missing and time.monotonic() < deadline:
            for rank in [rank for rank in missing if _store().check([_key(rank)])]:
                missing.remove(rank)
                cause = _store().get(_key(rank)).decode()
                causes += [f"rank {rank} failed: {cause}"] if cause else []
            time.sleep(_POLL_SECONDS)
    except RuntimeError:  # the store is gone, and the rank that held it
        missing = [0]
    return missing, causes


def _ranks(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"
