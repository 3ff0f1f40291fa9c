"""Resuming with another number of virtual workers (`batch.on_resize: rescale`): where in the recipe that is.

A run that keeps its virtual workers per rank changes kn when it resumes on another N. From there on it follows the
recipe of the new kn, whose steps are counted so that its epochs end where the old ones would have: the step of that
recipe is the run's own, less a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

from largebatch.errors import ConfigError
from largebatch.recipe.order import EpochOrder
from largebatch.recipe.schedule import Schedule


@dataclass(frozen=True)
class Resize:
    """The newest change of a run's minibatch; all that a checkpoint holds of it."""

    step: int
    """Updates done before it."""
    virtual_workers: int
    """k from there on."""
    images_consumed: int
    """Images seen before it, over the whole run."""
    recipe_step: int
    """The step of the recipe of the new kn that comes first."""
    first_image: int
    """Where the first new minibatch starts in the shuffle of the current epoch."""
    lr_before: float
    """Learning rate of the last update before it."""

    @property
    def shift(self) -> int:
        """A step of the run less the step of the recipe that it is."""
        return self.step - self.recipe_step


def rescaled_workers(virtual_workers: int, workers_per_pass: int, old_ranks: int, new_ranks: int) -> int:
    """k that leaves each rank as many virtual workers as it had. Raises ConfigError if they did not come out even.

    Ranks are dealt whole passes, of `workers_per_pass` virtual workers each.
    """
    passes, left = divmod(virtual_workers // workers_per_pass, old_ranks)
    if left:
        together = f" (execution.workers_per_pass: {workers_per_pass})" if workers_per_pass > 1 else ""
        raise ConfigError(
            f"batch.on_resize: rescale keeps the virtual workers per rank, but {virtual_workers}{together} on "
            f"{old_ranks} ranks were uneven; resume with {old_ranks} ranks, or with batch.on_resize=keep"
        )
    return passes * workers_per_pass * new_ranks


def make_resize(order: EpochOrder, schedule: Schedule, step: int, virtual_workers: int) -> Resize:
    """The change to `virtual_workers` when `step` updates of a run of `order` and `schedule` are done.

    Raises ConfigError if the new minibatch is larger than the set of images.
    """
    new = EpochOrder(order.images, virtual_workers, order.images_per_worker, order.seed)
    epoch, first_image = order.place(step)
    steps_left = (order.images - first_image) // new.global_batch
    return Resize(
        step=step,
        virtual_workers=virtual_workers,
        images_consumed=order.images_consumed(step),
        recipe_step=(epoch + 1) * new.steps_per_epoch - steps_left,
        first_image=first_image if steps_left else 0,
        lr_before=schedule.lr_at(max(0, step - 1)),
    )


@dataclass(frozen=True, kw_only=True)
class ResizedOrder(EpochOrder):
    """The order from `resize` on: the images that its epoch had left, then whole epochs; none twice in an epoch."""

    resize: Resize

    def recipe_step(self, step: int) -> int:
        return step - self.resize.shift

    def place(self, step: int) -> tuple[int, int]:
        epoch, start = super().place(step)
        if epoch == self.resize.recipe_step // self.steps_per_epoch:
            start = self.resize.first_image + (step - self.resize.step) * self.global_batch
        return epoch, start

    def images_consumed(self, step: int) -> int:
        return self.resize.images_consumed + (step - self.resize.step) * self.global_batch


@dataclass(frozen=True, kw_only=True)
class ResizedSchedule(Schedule):
    """The schedule from `resize` on: that of the new kn, whose learning rate, if larger, is reached by a ramp."""

    recipe: Schedule
    resize: Resize
    ramp_steps: int

    def lr_at(self, step: int) -> float:
        lr, done = self.recipe.lr_at(step - self.resize.shift), step - self.resize.step + 1
        if lr <= self.resize.lr_before or done >= self.ramp_steps:
            return lr
        return self.resize.lr_before + (lr - self.resize.lr_before) * done / self.ramp_steps


def resized_schedule(recipe: Schedule, resize: Resize, ramp_steps: int) -> ResizedSchedule:
    """`recipe`, the schedule of the new kn, from `resize` on, with a ramp of `ramp_steps`; it has a step at least."""
    shift = resize.shift
    steps = {
        "total_steps": max(recipe.total_steps + shift, resize.step + 1),
        "warmup_steps": max(0, recipe.warmup_steps + shift) if recipe.warmup_steps else 0,
        "decay_steps": tuple(step + shift for step in recipe.decay_steps if step + shift > 0),
    }
    return ResizedSchedule(**vars(recipe) | steps, recipe=recipe, resize=resize, ramp_steps=ramp_steps)
