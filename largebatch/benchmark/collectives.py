"""The all-reduce alone, over a range of sizes, in nccl-tests' terms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from largebatch.benchmark.breakdown import interquartile_range
from largebatch.benchmark.clock import make_clock
from largebatch.benchmark.options import Options
from largebatch.distributed.allreduce import BackendAllReduce
from largebatch.distributed.environment import Ranks
from largebatch.distributed.subgroups import Subgroups

SENT_AS = {"fast": torch.float32, "reproducible": torch.int32}
"""What the backend adds, by reduction."""
_SMALLEST = 4096  # bytes; each size is four times the one before
_ROUNDS = 5
_WINDOW_SECONDS = 0.03
_PATIENCE = 1.0  # seconds of one all-reduce above which larger ones are left out


def bandwidths(size: int, seconds: float, world_size: int) -> tuple[float, float]:
    """algbw and busbw in bytes a second, as nccl-tests defines them.

    algbw is the buffer over the time; busbw, algbw * 2(N-1)/N, is what each rank must at least have sent, so
    that it can be compared with the hardware's rate at any N.
    """
    algbw = size / seconds
    return algbw, algbw * 2 * (world_size - 1) / world_size


def measure_allreduce(
    options: Options, groups: Subgroups, ranks_per_node: int, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The backend's all-reduce and the reproducible one at every N above 1; complete on rank 0."""
    rows: list[dict[str, Any]] = []
    for count in options.ranks:
        members = groups.first(count) if count > 1 else None
        if members is not None:
            note(f"all-reduce alone, N={count}")
            rows += _measure_group(members, ranks_per_node, options.largest_allreduce)
        groups.sleep()
    return rows


def _measure_group(members: Ranks, ranks_per_node: int, largest: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    size = _SMALLEST
    while size <= largest:
        buffers = {name: torch.ones(size // 4, dtype=dtype, device=members.device) for name, dtype in SENT_AS.items()}
        once = {name: _seconds(buffer, members, 1) for name, buffer in buffers.items()}
        calls = max(1, math.ceil(_WINDOW_SECONDS / min(once.values())))
        windows: dict[str, list[float]] = {name: [] for name in SENT_AS}
        for _ in range(_ROUNDS):
            for name, buffer in buffers.items():
                windows[name].append(_seconds(buffer, members, calls))
        rows += [_row(name, size, members.world_size, ranks_per_node, windows[name]) for name in SENT_AS]
        if max(once.values()) > _PATIENCE:
            break
        size *= 4
    return rows


def _seconds(buffer: torch.Tensor, members: Ranks, calls: int) -> float:
    """Seconds of one of `calls` all-reduces, on the slowest rank; one more runs before them."""
    clock, exchange = make_clock(members.device), BackendAllReduce(members)
    for call in range(calls + 1):
        if call == 1:
            members.barrier()
            clock.mark()
        buffer.fill_(1)  # sums of sums would grow to infinity
        exchange.start(buffer).wait()
    clock.mark()
    return max(members.gather(clock.read()[-1])) / calls


def _row(reduction: str, size: int, world_size: int, ranks_per_node: int, windows: list[float]) -> dict[str, Any]:
    seconds = statistics.median(windows)
    algbw, busbw = bandwidths(size, seconds, world_size)
    return {
        "reduction": reduction,
        "world_size": world_size,
        "ranks_per_node": min(world_size, ranks_per_node),
        "size": size,
        "seconds": seconds,
        "spread": interquartile_range(windows),
        "algbw": algbw,
        "busbw": busbw,
        "windows": windows,
    }
