"""Sums over all ranks: the backend's own, and one whose order of addition does not depend on N.

Both take the partial sums that a rank holds and return a future of the total, so that they run while the
backward pass goes on.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from largebatch.distributed.environment import Ranks
from largebatch.recipe.tree import Node, combine, subtrees


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
    """One buffer on its way: its chunks are being sent to their owners."""

    work: dist.Work
    received: Tensor
    device: torch.device
    elements: int
    total: Future[Tensor]


class TreeAllReduce:
    """An all-reduce that adds in one fixed binary tree over the `leaves` of a step.

    Rank q owns chunk q of the buffer. Every rank sends each owner that chunk of its partial sums (one per
    maximal subtree of its block of leaves); the owner adds them in the tree's order; the owners' chunks are
    gathered. With aligned blocks a rank sends 2 (N-1)/N of the buffer, as a ring does.

    The second half of one buffer is started when the next buffer arrives (or at `flush`): every rank then
    issues its collectives in the same order, and the backward pass waits for a buffer only when the network
    is a whole buffer behind. On a GPU nothing waits: it is all queued on a stream of its own.
    """

    def __init__(self, ranks: Ranks, blocks: list[range], leaves: int) -> None:
        """`blocks[r]` is the contiguous block of leaves of rank r."""
        self._ranks = ranks
        self._nodes: list[list[Node]] = [subtrees(block, leaves) for block in blocks]
        self._root: Node = (0, leaves)
        self._in_flight: _Exchange | None = None
        cuda = ranks.wire_device.type == "cuda"
        self._stream = torch.cuda.Stream(ranks.device) if cuda else None

    def start(self, parts: list[Tensor]) -> Future[Tensor]:
        """Begin to sum; `parts` are this rank's subtrees, left to right. The total is a new 1-D tensor."""
        total: Future[Tensor] = Future(devices=[self._ranks.device] if self._stream else None)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            for part in parts:
                part.record_stream(self._stream)
        with self._on_stream():
            exchange = self._send_chunks(parts, total)
            previous, self._in_flight = self._in_flight, exchange
            if previous is not None:
                self._finish(previous)
            if self._stream is not None:
                self.flush()
        return total

    def flush(self) -> None:
        """Start the second half of the last buffer."""
        if self._in_flight is not None:
            self._finish(self._in_flight)
            self._in_flight = None

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def _chunk(self, elements: int) -> int:
        return -(-elements // self._ranks.world_size)

    def _owned(self, elements: int, rank: int) -> int:
        """Elements of the chunk that `rank` owns: the last chunks may be short, or empty."""
        chunk = self._chunk(elements)
        return max(0, min(chunk, elements - rank * chunk))

    def _send_chunks(self, parts: list[Tensor], total: Future[Tensor]) -> _Exchange:
        world, rank = self._ranks.world_size, self._ranks.rank
        assert len(parts) == len(self._nodes[rank]), "one part for each subtree that this rank holds"
        elements, wire = parts[0].numel(), self._ranks.wire_device
        sizes = [self._owned(elements, owner) for owner in range(world)]
        if len(parts) == 1:
            sent = parts[0].to(wire)
        else:  # all parts' chunk for owner 0, then all parts' chunk for owner 1, ...
            rows = [part.to(wire).split(sizes) for part in parts]
            sent = torch.cat([row[owner] for owner in range(world) for row in rows])
        held = [len(nodes) for nodes in self._nodes]
        received = sent.new_empty(sum(held) * sizes[rank])
        work = _started(
            dist.all_to_all_single(
                received,
                sent,
                output_split_sizes=[count * sizes[rank] for count in held],
                input_split_sizes=[len(parts) * size for size in sizes],
                group=self._ranks.group,
                async_op=True,
            )
        )
        return _Exchange(work, received, parts[0].device, elements, total)

    def _finish(self, exchange: _Exchange) -> None:
        """Add the chunk that this rank owns and gather all chunks."""
        exchange.work.wait()
        owned = self._owned(exchange.elements, self._ranks.rank)
        chunk = self._chunk(exchange.elements)
        nodes = [node for held in self._nodes for node in held]
        mine = exchange.received.new_empty(chunk)
        if owned:
            parts = dict(zip(nodes, exchange.received.view(-1, owned), strict=True))
            mine[:owned] = combine(self._root, parts, torch.add)
        gathered = mine.new_empty(chunk * self._ranks.world_size)
        work = _started(dist.all_gather_into_tensor(gathered, mine, group=self._ranks.group, async_op=True))
        if self._stream is not None:
            work.wait()  # makes this stream, not the host, wait; the future then notes the stream's event
            exchange.total.set_result(gathered[: exchange.elements])
        else:
            work.get_future().then(lambda done: _complete(exchange, done, gathered))


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "None comes back on ranks outside the group only"
    return work


def _complete(exchange: _Exchange, done: Future[object], gathered: Tensor) -> None:
    """Pass the result on, or the failure: a future that never completes would hang the backward pass."""
    try:
        done.value()
    except RuntimeError as error:
        exchange.total.set_exception(error)  # type: ignore[arg-type]
    else:
        exchange.total.set_result(gathered[: exchange.elements].to(exchange.device))
