"""Ranks of different speed get different numbers of passes (`execution.deal: measured`); the weights do not change.

Only a difference that lasts is followed. What decides is the same on all ranks, so no message agrees on a deal.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from largebatch.errors import UserError
from largebatch.recipe.batch import Deal, deal_by_speed, deal_without
from largebatch.training.stragglers import Pace

_GAIN = 1.1  # a step that takes less than this share longer than it could is left as it is
_AGREEING = 3  # measurements in a row that promise the gain
_SECONDS = 2.0  # that they are made over
_MOST_AGREEING = 48
_NAMED_RANKS = 16


class Dealer:
    """Which deal holds at which step of a run."""

    def __init__(self, deal: Deal, *, measured: bool) -> None:
        """Begin with `deal`, and keep to it unless `measured`."""
        self._deals = [(0, deal)]
        self._measured = measured and len(deal.passes) > 1
        self._needed = _AGREEING
        self._recent: list[Pace] = []

    @property
    def newest(self) -> Deal:
        """The deal that holds from the last change on."""
        return self._deals[-1][1]

    def at(self, step: int) -> Deal:
        """The deal of `step`."""
        return next(deal for since, deal in reversed(self._deals) if since <= step)

    def change(self, step: int, deal: Deal) -> None:
        """From `step` on, deal by `deal`; no rank may have asked its loader for the passes of that step yet."""
        self._deals.append((step, deal))

    def consider(self, pace: Pace) -> str | None:
        """Take in a measurement; if it changes the deal, a line on it.

        A new deal is that of the median of the last measurements, if each of them promises the gain. Every change
        doubles how many must agree for the next: a difference that comes and goes is not worth following. The deal
        changes after the last step that a loader has been asked for, so nothing that it has prefetched is lost.
        """
        if not self._measured or min(pace.of_a_pass) <= 0:
            return None
        self._recent.append(pace)
        while self._enough(self._recent[1:]):
            self._recent = self._recent[1:]
        if not self._enough(self._recent):
            return None
        recent, now = self._recent, self.newest
        of_a_pass = [statistics.median(own) for own in zip(*(p.of_a_pass for p in recent), strict=True)]
        new = deal_by_speed(now, of_a_pass)
        if any(now.seconds(p.of_a_pass) < _GAIN * new.seconds(p.of_a_pass) for p in recent):
            return None
        self._recent, self._needed = [], min(2 * self._needed, _MOST_AGREEING)
        self.change(pace.asked + 1, new)
        share = new.seconds(of_a_pass) / now.seconds(of_a_pass)
        return (
            f"from step {pace.asked + 1} on, the ranks run {_counts(new)} virtual workers, by their measured speed: a "
            f"step should take {share:.2f} of the time that it takes now, and gives the same bits"
        )

    def _enough(self, measurements: list[Pace]) -> bool:
        return len(measurements) >= self._needed and sum(pace.seconds for pace in measurements) >= _SECONDS


class ReplayedDeals(Dealer):
    """The deals of a run's steps without the passes that did not arrive when it was recorded."""

    def __init__(self, deal: Deal, passes: int, absent: Mapping[int, Sequence[int]]) -> None:
        """The recorded run had so many `passes` a step, and those `absent` by step. Raises UserError if `deal` has
        other ones, or if a step has too few for the ranks."""
        super().__init__(deal, measured=False)
        if passes != deal.leaves or not {p for own in absent.values() for p in own} <= set(range(passes)):
            raise UserError(
                f"--replay: the recorded run had {passes} passes a step, this one has {deal.leaves}; with "
                "batch.workers_per_rank, start as many ranks"
            )
        self._absent = absent
        fewest = deal.leaves - max(map(len, absent.values()), default=0)
        if fewest < len(deal.passes):
            raise UserError(
                f"--replay: {fewest} passes arrived in a step of the recorded run, too few for {len(deal.passes)} "
                f"ranks (each needs at least one); start at most {fewest} ranks"
            )

    def at(self, step: int) -> Deal:
        """See `Dealer.at`."""
        return deal_without(self.newest, self._absent.get(step, ()))


def _counts(deal: Deal) -> str:
    counts = deal.workers_on_rank()
    return ", ".join(map(str, counts)) if len(counts) <= _NAMED_RANKS else f"{min(counts)} to {max(counts)}"
