"""Who runs what: n images a virtual worker, k virtual workers a step, dealt to N ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from largebatch.errors import ConfigError
from largebatch.section import Section


class BatchSettings(Section):
    """The minibatch kn as the paper defines it: k workers of n images."""

    virtual_workers: int = Field(8, ge=1)
    """k: virtual workers per step; the ranks share them, so N may be anything from 1 to k."""
    images_per_worker: int = Field(32, ge=1)
    """n: images that one virtual worker normalises together (the paper: 32)."""
    loss_mean_over: Literal["global_batch", "images_per_worker"] = "global_batch"
    """What the loss of each worker is divided by: kn, as remark 3 says, or n, which makes gradients k times
    larger ('cancelling k', wrong with weight decay)."""
    shuffle: Literal["once", "per_worker"] = "once"
    """once: one shuffle an epoch, divided among the workers (remark 4); per_worker: remark 4 done wrong."""
    on_resize: Literal["keep", "rescale"] = "keep"
    """When a run goes on with another number of ranks. keep: they share the same virtual workers, and nothing else
    changes; rescale: each rank keeps as many as it had, so kn changes, and with it the learning rate by its rule."""

    @model_validator(mode="after")
    def _resize_fits(self) -> BatchSettings:
        if self.on_resize == "rescale" and (self.shuffle, self.loss_mean_over) != ("once", "global_batch"):
            raise ValueError("on_resize rescale needs shuffle: once and loss_mean_over: global_batch")
        return self

    @property
    def global_batch(self) -> int:
        """kn: images per optimiser update."""
        return self.virtual_workers * self.images_per_worker


def block(total: int, parts: int, index: int) -> range:
    """Part `index` of `range(total)` cut into `parts` contiguous blocks whose sizes differ by at most one."""
    return range(index * total // parts, (index + 1) * total // parts)


def deal_passes(virtual_workers: int, workers_per_pass: int, world_size: int) -> list[range]:
    """The passes of one step that each rank runs.

    A pass is one forward and backward of `workers_per_pass` virtual workers: pass p runs virtual workers
    ``p * workers_per_pass`` and following. Which workers share a pass depends on the recipe alone, so
    rounding inside a pass cannot depend on N; N only decides who runs which passes.

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
    return [block(passes, world_size, rank) for rank in range(world_size)]


def deal_workers(virtual_workers: int, workers_per_pass: int, world_size: int) -> list[int]:
    """Virtual workers on each rank (`workers_on_rank` of the plan); raises as `deal_passes` does."""
    return [len(p) * workers_per_pass for p in deal_passes(virtual_workers, workers_per_pass, world_size)]
