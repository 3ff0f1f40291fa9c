"""Who runs what: n images per virtual worker, k virtual workers per step, dealt to N ranks."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from largebatch.errors import ConfigError
from largebatch.section import FreeOnResume, Section


class DeadlineSettings(Section):
    """How long a step may take before ranks start no further pass in it. One of the two is set."""

    slack: float | None = Field(None, gt=0, le=1000)
    """A share of the usual time, on top of it: the median over ranks and over the newest records of the metrics."""
    seconds: float | None = Field(None, gt=0, le=1e6)
    """From the start of the step."""

    @model_validator(mode="after")
    def _one(self) -> DeadlineSettings:
        if (self.slack is None) == (self.seconds is None):
            raise ValueError("set either slack, a share of the usual time such as 0.3, or seconds")
        return self


class BatchSettings(Section):
    """The minibatch kn as the paper defines it: k workers of n images."""

    virtual_workers: int = Field(8, ge=1)
    """k: virtual workers per step; the ranks share them, so N may be anything from 1 to k."""
    workers_per_rank: int | None = Field(None, ge=1)
    """Instead of `virtual_workers`: k is this many times the number of ranks the run starts on, so that kn and the
    learning rate follow the number of GPUs, as in the paper (1: each GPU is a worker). Results then depend on N."""
    images_per_worker: int = Field(32, ge=1)
    """n: images that one virtual worker normalises together (the paper: 32)."""
    loss_mean_over: Literal["global_batch", "images_per_worker"] = "global_batch"
    """What the loss of each worker is divided by: kn, as remark 3 says, or n, which makes gradients k times
    larger ('cancelling k', wrong with weight decay)."""
    shuffle: Literal["once", "per_worker"] = "once"
    """once: one shuffle per epoch, divided among the workers (remark 4); per_worker: remark 4 done wrong."""
    on_resize: FreeOnResume[Literal["keep", "rescale"]] = "keep"
    """When a run resumes on another number of ranks. keep: they share the same virtual workers, and nothing else
    changes; rescale: each rank keeps the number it had, so kn changes, and the learning rate by its rule."""

    deadline: DeadlineSettings | None = None
    """A rank that is past it starts no further pass in a step, which then is the mean over the workers that arrived
    (docs/stragglers.md). Which did is recorded, and `train --replay` repeats it."""

    backup_workers: int = Field(0, ge=0)
    """b: so many workers more than k are dealt, and when k of them have finished, no rank starts another pass (Chen et
    al. 2016, docs/stragglers.md). The step is the mean over those that arrived, and is recorded as with `deadline`."""

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, values: Any) -> Any:
        if (
            isinstance(values, dict) and type(values.get("workers_per_rank")) is int
        ):  # another value is reported as such
            if values.get("virtual_workers") is not None:
                raise ValueError(
                    f"virtual_workers {values['virtual_workers']} and workers_per_rank {values['workers_per_rank']} "
                    "are both set, and each says how many virtual workers there are; set one of them to null"
                )
            values = {key: value for key, value in values.items() if key != "virtual_workers"}
        return values

    @model_serializer(mode="wrap")
    def _only_one(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = serialise(self)
        if self.workers_per_rank is not None:
            del values["virtual_workers"]  # it follows, once N is known
        return values

    @model_validator(mode="after")
    def _resize_fits(self) -> BatchSettings:
        if self.on_resize == "rescale" and (self.shuffle, self.loss_mean_over) != ("once", "global_batch"):
            raise ValueError("on_resize rescale needs shuffle: once and loss_mean_over: global_batch")
        if self.on_resize == "rescale" and self.drops:
            raise ValueError("on_resize rescale is not for runs with a deadline or backup_workers; set keep")
        if self.backup_workers and (self.deadline or self.workers_per_rank or self.loss_mean_over != "global_batch"):
            raise ValueError(
                f"backup_workers {self.backup_workers} is not for runs with a deadline, workers_per_rank or "
                "loss_mean_over: images_per_worker; set one of them"
            )
        return self

    @property
    def drops(self) -> bool:
        """Whether workers of a step may be left out."""
        return self.deadline is not None or self.backup_workers > 0

    @property
    def dealt_workers(self) -> int:
        """k + b: virtual workers that the ranks run in a step where nothing is dropped."""
        return self.virtual_workers + self.backup_workers

    @property
    def global_batch(self) -> int:
        """kn: images per optimiser update."""
        return self.virtual_workers * self.images_per_worker


def block(total: int, parts: int, index: int) -> range:
    """Part `index` of `range(total)` cut into `parts` contiguous blocks whose sizes differ by at most one."""
    return range(index * total // parts, (index + 1) * total // parts)


@dataclass(frozen=True)
class Deal:
    """Which rank runs which passes of a step; no number of the training depends on it.

    A pass (a leaf of the sum over all of them) is one forward and backward of `workers_per_pass` virtual workers: pass
    p runs virtual workers ``p * workers_per_pass`` and following. Which workers share a pass depends on the recipe
    alone, so rounding inside a pass cannot depend on N.
    """

    passes: tuple[tuple[int, ...], ...]
    """For each rank, its passes in the order in which it runs them."""
    workers_per_pass: int = 1
    absent: tuple[int, ...] = ()
    """Passes that no rank runs, since they did not arrive in the step that is replayed."""

    def __post_init__(self) -> None:
        dealt = sorted([p for own in self.passes for p in own] + list(self.absent))
        if dealt != list(range(len(dealt))):
            raise ValueError(f"each pass must be dealt to one rank, these are {dealt}")
        if not all(self.passes):
            # DDP starts the exchange of a rank's gradients in its last backward: without one the others wait for ever.
            raise ValueError(f"each rank must have a pass, rank {self.passes.index(())} has none")

    @property
    def leaves(self) -> int:
        """Passes of a step, over all ranks and absent ones."""
        return sum(map(len, self.passes)) + len(self.absent)

    def workers_of(self, rank: int) -> list[range]:
        """The virtual workers of each of a rank's passes."""
        m = self.workers_per_pass
        return [range(p * m, (p + 1) * m) for p in self.passes[rank]]

    def workers_on_rank(self) -> list[int]:
        """Virtual workers on each rank (`workers_on_rank` of the plan)."""
        return [len(of_rank) * self.workers_per_pass for of_rank in self.passes]

    def seconds(self, of_a_pass: Sequence[float]) -> float:
        """How long the slowest rank takes for its passes, each of which takes a rank so long."""
        return max(len(of_rank) * seconds for of_rank, seconds in zip(self.passes, of_a_pass, strict=True))


def deal_equally(virtual_workers: int, workers_per_pass: int, world_size: int) -> Deal:
    """Contiguous blocks whose sizes differ by at most one pass.

    Raises ConfigError if the passes do not come out even, or if there are more ranks than passes.
    """
    if virtual_workers % workers_per_pass:
        raise ConfigError(
            f"execution.workers_per_pass: {workers_per_pass} does not divide batch.virtual_workers "
            f"{virtual_workers}; choose one that does"
        )
    passes = virtual_workers // workers_per_pass
    if world_size > passes:
        fewer = f" at execution.workers_per_pass {workers_per_pass}" if workers_per_pass > 1 else ""
        raise ConfigError(
            f"batch.virtual_workers: {virtual_workers} virtual workers{fewer} make {passes} passes a step, too few "
            f"for {world_size} ranks (each needs at least one); start at most {passes} ranks, or raise "
            f"batch.virtual_workers (which changes the minibatch and with it the learning rate)"
        )
    return Deal(tuple(tuple(block(passes, world_size, rank)) for rank in range(world_size)), workers_per_pass)


def deal_by_speed(deal: Deal, of_a_pass: Sequence[float]) -> Deal:
    """The passes of `deal` in contiguous blocks such that the slowest rank finishes as early as possible.

    `of_a_pass`: each rank's seconds per pass.
    """
    counts = [1] * len(of_a_pass)
    done = [(2 * seconds, rank) for rank, seconds in enumerate(of_a_pass)]  # each rank's end with one pass more
    heapq.heapify(done)
    for _ in range(deal.leaves - len(counts)):
        end, rank = done[0]
        counts[rank] += 1
        heapq.heapreplace(done, (end + of_a_pass[rank], rank))
    cuts = itertools.pairwise([0, *itertools.accumulate(counts)])
    return Deal(tuple(tuple(range(*cut)) for cut in cuts), deal.workers_per_pass)


def deal_without(deal: Deal, absent: Sequence[int]) -> Deal:
    """The passes of `deal` but for those `absent`, dealt equally. There must be one for each rank."""
    ranks = len(deal.passes)
    present = sorted(set(range(deal.leaves)) - set(absent))
    passes = tuple(tuple(present[i] for i in block(len(present), ranks, rank)) for rank in range(ranks))
    return Deal(passes, deal.workers_per_pass, tuple(absent))
