"""A rank that computes slower than the others makes all of them wait: which one, and how much slower."""

from __future__ import annotations

import socket
import statistics
from dataclasses import dataclass

import torch

from largebatch.distributed.environment import Ranks


@dataclass(frozen=True)
class Pace:
    """How long the ranks computed since the record before; the same on all of them."""

    compute: list[float]
    """Seconds of a step, by rank."""
    of_a_pass: list[float]
    """Seconds of a pass, by rank: ranks may have different numbers of them."""
    of_a_pass_with_data: list[float]
    """The same and the wait for its images."""
    asked: int
    """The newest step that a rank has asked its loader for."""
    seconds: float
    """What this was measured over."""


def gather_pace(
    ranks: Ranks, *, compute: float, data_wait: float, steps: int, passes: int, asked: int, seconds: float
) -> Pace:
    """Each rank's seconds of `compute` and `data_wait` in `steps` steps and, on this rank, `passes`. Called on all
    ranks together."""
    own = [compute / steps, compute / passes, (compute + data_wait) / passes, asked, seconds]
    table = torch.zeros(ranks.world_size, len(own), dtype=torch.float64, device=ranks.device)
    table[ranks.rank] = torch.tensor(own)
    by_step, of_a_pass, with_data, asked_for, seconds_on = ranks.sum(table).t().tolist()
    return Pace(by_step, of_a_pass, with_data, int(max(asked_for)), seconds_on[0])


class StragglerWatch:
    """Names a rank that computes slower than the others, per pass."""

    def __init__(self, ranks: Ranks, *, factor: float) -> None:
        """A rank is named from `factor` times the others' median on."""
        self._factor = factor
        self._hosts: list[str] = ranks.gather(socket.gethostname())
        self._named: int | None = None

    def compare(self, pace: Pace) -> tuple[dict[str, float], str | None]:
        """From the ranks' pace to metrics and, if one has become slow, a line on it."""
        record: dict[str, float] = {"compute": statistics.median(pace.compute)}
        by_pass = pace.of_a_pass
        if len(by_pass) == 1:
            return record, None
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
