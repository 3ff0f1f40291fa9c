"""Resuming from a checkpoint: the same run, unless its minibatch should follow the number of ranks."""

from __future__ import annotations

from typing import Any

from largebatch.config import Config
from largebatch.data.source import changes
from largebatch.errors import UserError
from largebatch.plan import Plan, make_order, run_schedule
from largebatch.recipe.order import EpochOrder
from largebatch.recipe.resize import Resize, make_resize, rescaled_workers
from largebatch.training.checkpoint import TrainState


def resume_config(
    config: Config,
    state: TrainState | None,
    *,
    world_size: int,
    train_images: int,
    data: dict[str, dict[str, Any]],
) -> tuple[Config, Resize | None]:
    """The config, with the k that holds from here on, and the newest resize, of a run that resumes from `state`.

    Raises UserError if the run has another order of images, and ConfigError if the workers cannot be dealt.
    """
    if state is None:
        if config.batch.on_resize == "rescale":  # refused now rather than when it is needed
            _rescaled(config, world_size, world_size)
        return config, None
    resize = Resize(**state.resize) if state.resize else None
    if resize is not None:
        config = config.with_workers(resize.virtual_workers)
    elif config.batch.workers_per_rank is not None:  # k is that of the ranks it started on, until it is rescaled
        config = config.with_workers(state.virtual_workers)
    if config.data.on_change == "refuse":
        check_data(state.data, data)
    order = make_order(config, train_images, resize)
    _check_order(order, state)
    if config.batch.on_resize == "rescale" and state.world_size != world_size:
        workers = _rescaled(config, state.world_size, world_size)
        resize = make_resize(order, run_schedule(config, order, resize), state.step, workers)
        config = config.with_workers(workers)
    return config, resize


def check_data(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> None:
    """Raise UserError if what `describe` says `now` of a part is not what it said `before`."""
    differences = [text for part in now if part in before and (text := changes(before[part], now[part], part))]
    if differences:
        raise UserError(
            f"data.root: {'; '.join(differences)}. The run was trained on the original data: restore them (to skip "
            "a damaged file, keep it and set data.on_error=skip), start over in another folder, or set "
            "data.on_change=accept"
        )


def _rescaled(config: Config, old_ranks: int, new_ranks: int) -> int:
    return rescaled_workers(config.batch.virtual_workers, config.execution.workers_per_pass, old_ranks, new_ranks)


def _check_order(order: EpochOrder, state: TrainState) -> None:
    """Raise UserError unless `order` is the one that `state` came by."""
    consumed, epoch = order.images_consumed(state.step), order.epoch_of(state.step)
    if state.images_consumed != consumed:
        raise UserError(
            f"the checkpoint has consumed {state.images_consumed} images in {state.step} steps, this run would have "
            f"{consumed}; its batch section must be the same"
        )
    if state.order_fingerprint != order.fingerprint(epoch):
        raise UserError(
            f"the checkpoint saw the images of epoch {epoch} in another order than this run would; the data set and "
            "the seed must be the same"
        )


def describe_resize(state: TrainState, plan: Plan, resize: Resize) -> str:
    """What a run that has just been rescaled changes, as a line for the log."""
    return (
        f"resized at step {resize.step}: {plan.world_size} ranks instead of {state.world_size}, each with as many "
        f"virtual workers as before, make a minibatch of {plan.global_batch} images; the learning rate goes from "
        f"{resize.lr_before:g} towards a peak of {plan.peak_lr:g} (batch.on_resize: rescale)"
    )
