"""Smaller groups within one launch: the first N ranks work while the others sleep."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import replace

import torch.distributed as dist

from largebatch.distributed.environment import Ranks

_LONG = datetime.timedelta(days=7)  # a rank may sleep through all that the others measure


class Subgroups:
    """The groups of the first N ranks of a launch, for several N."""

    def __init__(self, ranks: Ranks, sizes: Iterable[int]) -> None:
        """Made on all ranks of the launch at once; `connect` with ``group_of_one``."""
        self._launch = ranks
        # gloo on any device: a rank that waits in it blocks in the kernel, while NCCL's barrier keeps the GPU busy.
        everyone = range(ranks.world_size)
        self._sleepers = self._new_group(everyone, "gloo", _LONG)
        self._groups = {size: self._new_group(everyone[:size], ranks.backend) for size in sorted(set(sizes))}

    def _new_group(
        self, members: range, backend: str, timeout: datetime.timedelta | None = None
    ) -> dist.ProcessGroup | None:
        """Called on all ranks alike; None on a rank outside the group."""
        group = dist.new_group(list(members), backend=backend, timeout=timeout)
        return group if isinstance(group, dist.ProcessGroup) else None

    def first(self, size: int, *, ddp: bool = True) -> Ranks | None:
        """The first `size` ranks as a group, None on a rank outside it.

        Without `ddp` (one rank only) the rank stands alone, as a run without a launcher does.
        """
        assert ddp or size == 1, "several ranks cannot do without DDP"
        if self._launch.rank >= size:
            return None
        return replace(self._launch, world_size=size, group=self._groups[size] if ddp else None)

    def sleep(self) -> None:
        """Wait until every rank of the launch is here, with neither CPU nor GPU time."""
        with self._launch.whereabouts.waiting("asleep"):
            dist.barrier(group=self._sleepers)
