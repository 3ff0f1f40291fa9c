"""A rank that computes slower than the others makes all of them wait: which one, and how much slower."""

from __future__ import annotations

import socket
import statistics

import torch

from largebatch.distributed.environment import Ranks


class StragglerWatch:
    """Compares the ranks' own compute time, per pass, since ranks may have different numbers of passes."""

    def __init__(self, ranks: Ranks, *, passes: int, factor: float) -> None:
        """`passes` is this rank's number a step; a rank is named from `factor` times the others' median on."""
        self._ranks = ranks
        self._factor = factor
        told: list[tuple[str, int]] = ranks.gather((socket.gethostname(), passes))
        self._hosts = [host for host, _ in told]
        self._passes = [count for _, count in told]
        self._named: int | None = None

    def compare(self, seconds: float) -> tuple[dict[str, float], str | None]:
        """From this rank's own seconds of a step to metrics of all ranks and, if one has become slow, a line on it.

        Called on all ranks together.
        """
        everyone = self._gather(seconds)
        record: dict[str, float] = {"compute": statistics.median(everyone)}
        if self._ranks.world_size == 1:
            return record, None
        by_pass = [own / count for own, count in zip(everyone, self._passes, strict=True)]
        slowest = by_pass.index(max(by_pass))
        others = statistics.median(by_pass[:slowest] + by_pass[slowest + 1 :])
        slowdown = by_pass[slowest] / others if others else 1.0
        before, self._named = self._named, slowest if slowdown > self._factor else None
        line = None
        if self._named is not None and self._named != before:
            line = (
                f"warning: rank {slowest} on {self._hosts[slowest]} computes {slowdown:.1f} times slower than the "
                "median of the others, and all wait for it; look for another process there, heat, or a worn device"
            )
        return record | {"slowest_rank": slowest, "slowdown": slowdown}, line

    def _gather(self, seconds: float) -> list[float]:
        own = torch.zeros(self._ranks.world_size, dtype=torch.float64, device=self._ranks.device)
        own[self._ranks.rank] = seconds
        return self._ranks.sum(own).tolist()
