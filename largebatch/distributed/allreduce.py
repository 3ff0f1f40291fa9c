"""A sum over all ranks, started during the backward pass."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from largebatch.distributed.environment import Ranks


class AllReduce(Protocol):
    """A sum over all ranks, started bucket by bucket in the same order on every rank."""

    def start(self, buffer: Tensor) -> Future[Tensor]:
        """Begin to sum `buffer`, in place."""
        ...


class BackendAllReduce:
    """NCCL's or gloo's own all-reduce, by whichever algorithm it likes: integers add in any order."""

    def __init__(self, ranks: Ranks) -> None:
        self._group = ranks.group

    def start(self, buffer: Tensor) -> Future[Tensor]:
        work = dist.all_reduce(buffer, group=self._group, async_op=True)
        assert work is not None, "None comes back on ranks outside the group only"
        return work.get_future().then(lambda done: done.value()[0])


class NoExchange:
    """Sends nothing: each rank continues with its own sums. Only to measure what the exchange costs."""

    def start(self, buffer: Tensor) -> Future[Tensor]:
        total: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        total.set_result(buffer)
        return total
