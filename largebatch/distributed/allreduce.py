"""Sums over all ranks: the backend's own, and one whose order of addition does not depend on N.

Both take the partial sums that a rank holds and return a future of the total, so that they run while the
backward pass goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from largebatch.distributed.environment import Ranks
from largebatch.recipe.tree import Node, combine, subtrees

_TAGS = 64  # tags of one exchange: more than a rank ever holds subtrees, and the last for the results


class AllReduce(Protocol):
    """A sum over all ranks, started bucket by bucket in the same order on every rank."""

    def start(self, parts: list[Tensor]) -> Future[Tensor]:
        """Begin to sum `parts` (each 1-D, one length and dtype; one per subtree that this rank holds)."""
        ...

    def flush(self) -> None:
        """Say that nothing more will be started in this step, so that every future can complete."""
        ...


class BackendAllReduce:
    """NCCL's or gloo's own all-reduce: equal on any N up to floating-point rounding."""

    def __init__(self, ranks: Ranks) -> None:
        self._group = ranks.group

    def start(self, parts: list[Tensor]) -> Future[Tensor]:
        """Begin to sum over ranks, in place of ``parts[0]``, the only part."""
        (buffer,) = parts
        work = _started(dist.all_reduce(buffer, group=self._group, async_op=True))
        return work.get_future().then(lambda done: done.value()[0])

    def flush(self) -> None:
        """Nothing is held back."""


class NoExchange:
    """Sends nothing: each rank goes on with its own sums. Only to measure what the exchange costs."""

    def start(self, parts: list[Tensor]) -> Future[Tensor]:
        """Complete at once, with the newest of `parts`."""
        cuda = parts[-1].is_cuda
        total: Future[Tensor] = Future(devices=[parts[-1].device] if cuda else None)
        total.set_result(parts[-1])
        return total

    def flush(self) -> None:
        """Nothing is held back."""


@dataclass
class _Exchange:
    """One buffer on its way."""

    parts: list[Tensor]
    """This rank's subtrees, where they can be sent from; the last one's memory becomes the total's."""
    received: dict[Node, Tensor]
    """The other ranks' subtrees of the chunk that this rank owns."""
    works: list[dist.Work]
    tag: int
    device: torch.device
    total: Future[Tensor]


class TreeAllReduce:
    """An all-reduce that adds in one fixed binary tree over the `leaves` of a step.

    Rank q owns chunk q of the buffer. Every rank sends each owner that chunk of its partial sums (one per
    maximal subtree of its block of leaves); the owner adds them in the tree's order, and sends the result to
    all. With aligned blocks a rank sends 2 (N-1)/N of the buffer, as a ring does. It goes from and to the
    buffers themselves, point to point: gloo's own all-to-all uses a link in one direction at a time. Two ranks with
    a subtree each rather send each other all of it, and each adds all: as many bytes, and half the messages.

    The second half of one buffer is started when the next buffer arrives (or at `flush`): every rank then
    issues its messages in the same order, and the backward pass waits for a buffer only when the network
    is a whole buffer behind. On a GPU nothing waits: it is all queued on a stream of its own.
    """

    def __init__(self, ranks: Ranks, blocks: list[range], leaves: int) -> None:
        """`blocks[r]` is the contiguous block of leaves of rank r."""
        self._ranks = ranks
        self._nodes: list[list[Node]] = [subtrees(block, leaves) for block in blocks]
        self._root: Node = (0, leaves)
        self._others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
        self._all_own_all = [len(nodes) for nodes in self._nodes] == [1, 1]
        self._newest: _Exchange | None = None
        self._gathering: list[_Exchange] = []
        self._received: list[Tensor] = []
        self._sequence = 0
        cuda = ranks.wire_device.type == "cuda"
        self._stream = torch.cuda.Stream(ranks.device) if cuda else None

    def start(self, parts: list[Tensor]) -> Future[Tensor]:
        """Begin to sum; `parts` are this rank's subtrees, left to right, and are overwritten."""
        total: Future[Tensor] = Future(devices=[self._ranks.device] if self._stream else None)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            for part in parts:
                part.record_stream(self._stream)
        with self._on_stream():
            previous, self._newest = self._newest, self._send_to_owners(parts, total)
            if previous is not None:
                self._add_and_gather(previous)
        if self._stream is not None:
            self.flush()
        return total

    def flush(self) -> None:
        """Start the second half of the last buffer, and complete all."""
        with self._on_stream():
            if self._newest is not None:
                self._add_and_gather(self._newest)
                self._newest = None
            for exchange in self._gathering:
                _wait(exchange.works)
                exchange.total.set_result(exchange.parts[-1].to(exchange.device))
            self._gathering.clear()

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def _chunk(self, elements: int, owner: int) -> slice:
        """What `owner` owns of a buffer: the last chunks may be short, or empty."""
        if self._all_own_all:
            return slice(0, elements)
        size = -(-elements // self._ranks.world_size)
        return slice(min(owner * size, elements), min((owner + 1) * size, elements))

    def _send_to_owners(self, parts: list[Tensor], total: Future[Tensor]) -> _Exchange:
        assert len(parts) == len(self._nodes[self._ranks.rank]), "one part for each subtree that this rank holds"
        device, parts = parts[0].device, [part.to(self._ranks.wire_device) for part in parts]
        elements = parts[0].numel()
        own = self._chunk(elements, self._ranks.rank)
        expected = [(rank, i, node) for rank in self._others for i, node in enumerate(self._nodes[rank])]
        size = own.stop - own.start
        rows = self._receive_buffer(parts[0], len(expected) * size).view(len(expected), size)
        self._sequence += 1
        tag = self._sequence % (1 << 20) * _TAGS
        messages = [
            self._message(dist.irecv, row, rank, tag + i) for row, (rank, i, _) in zip(rows, expected, strict=True)
        ]
        for rank in self._others:
            chunk = self._chunk(elements, rank)
            messages += [self._message(dist.isend, part[chunk], rank, tag + i) for i, part in enumerate(parts)]
        received = {node: row for row, (_, _, node) in zip(rows, expected, strict=True)}
        return _Exchange(parts, received, _post(messages), tag, device, total)

    def _add_and_gather(self, exchange: _Exchange) -> None:
        """Add the chunk that this rank owns in the tree's order, and send it to all who have not done so too."""
        _wait(exchange.works)
        result = exchange.parts[-1]
        own = self._chunk(result.numel(), self._ranks.rank)
        held = zip(self._nodes[self._ranks.rank], [part[own] for part in exchange.parts], strict=True)
        result[own] = combine(self._root, exchange.received | dict(held), Tensor.add_)
        tag = exchange.tag + _TAGS - 1
        messages = []
        for rank in [] if self._all_own_all else self._others:
            chunk = self._chunk(result.numel(), rank)
            messages.append(self._message(dist.irecv, result[chunk], rank, tag))
            messages.append(self._message(dist.isend, result[own], rank, tag))
        exchange.works = _post(messages)
        self._gathering.append(exchange)

    def _receive_buffer(self, like: Tensor, elements: int) -> Tensor:
        """Memory to receive into, the same in each step: fresh memory costs more than what comes to lie in it."""
        position = len(self._gathering) + (self._newest is not None)
        if position == len(self._received):
            self._received.append(like.new_empty(0))
        if self._received[position].numel() != elements or self._received[position].dtype != like.dtype:
            self._received[position] = like.new_empty(elements)
        return self._received[position]

    def _message(
        self, operation: Callable[..., dist.Work | None], content: Tensor, rank: int, tag: int
    ) -> dist.P2POp | None:
        """A message to or from `rank` of the group; None where there is nothing to say."""
        if content.numel() == 0:
            return None
        return dist.P2POp(operation, content, group=self._ranks.group, tag=tag, group_peer=rank)


def _post(messages: list[dist.P2POp | None]) -> list[dist.Work]:
    posted = [message for message in messages if message is not None]
    return dist.batch_isend_irecv(posted) if posted else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "None comes back on ranks outside the group only"
    return work
