"""A count over all ranks of something that each does at its own time, in the store where they met."""

from __future__ import annotations

import itertools

import torch.distributed as dist

from largebatch.distributed.environment import Ranks

_numbers = itertools.count()


class StepCounter:
    """Counts by step. Make it on all ranks alike: the order in which they are made tells them apart."""

    def __init__(self, ranks: Ranks) -> None:
        self._name = f"largebatch/count/{next(_numbers)}"
        self._is_main = ranks.is_main
        self._store = ranks.store or dist.HashStore()

    def begin(self, step: int) -> None:
        """`step` comes next; what was counted two steps ago, which every rank has left, is forgotten."""
        if self._is_main:
            self._store.delete_key(f"{self._name}/{step - 2}")

    def add(self, step: int) -> int:
        """Count one more; returns how many all ranks have counted in `step` so far. Waits for the store's answer."""
        return self._store.add(f"{self._name}/{step}", 1)
