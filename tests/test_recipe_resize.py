"""Another minibatch from some step on: no image twice in an epoch, and the learning rate of the new recipe."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from largebatch.errors import ConfigError
from largebatch.recipe.order import EpochOrder, permutation
from largebatch.recipe.resize import Resize, ResizedOrder, make_resize, rescaled_workers, resized_schedule
from largebatch.recipe.schedule import Schedule, ScheduleSettings, make_schedule

IMAGES, N, SEED = 1003, 4, 7
# η 0.1 at 256; an epoch of warmup, decay at 4 and 6 of 8 epochs.
SETTINGS = ScheduleSettings.model_validate(
    {"epochs": 8, "warmup": {"epochs": 1}, "decay": {"epochs": [4, 6]}, "reference_batch": 8}
)


def reference_batches(stretches: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Epoch and images of each step, for stretches of (k, steps): a pointer into one shuffle after the other.

    An epoch is over when what it has left is too little for a step, of the old minibatch or of the new one.
    """
    epoch, pointer, found = 0, 0, []
    for k, steps in stretches:
        for _ in range(steps):
            if pointer + k * N > IMAGES:
                epoch, pointer = epoch + 1, 0
            found.append((epoch, permutation(IMAGES, SEED, epoch, 0)[pointer : pointer + k * N].tolist()))
            pointer += k * N
        if pointer + k * N > IMAGES:
            epoch, pointer = epoch + 1, 0
    return found


def resized(order: EpochOrder, schedule: Schedule, step: int, k: int, ramp_steps: int = 0) -> tuple:
    resize = make_resize(order, schedule, step, k)
    new = ResizedOrder(IMAGES, k, N, SEED, resize=resize)
    recipe = make_schedule(SETTINGS, global_batch=new.global_batch, steps_per_epoch=new.steps_per_epoch)
    return new, resized_schedule(recipe, resize, ramp_steps)


def start(k: int) -> tuple[EpochOrder, Schedule]:
    order = EpochOrder(IMAGES, k, N, SEED)
    return order, make_schedule(SETTINGS, global_batch=order.global_batch, steps_per_epoch=order.steps_per_epoch)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 90)), min_size=2, max_size=4))
def test_each_stretch_takes_what_its_epoch_had_left(stretches: list[tuple[int, int]]) -> None:
    expected, step, consumed = reference_batches(stretches), 0, 0
    order, schedule = start(stretches[0][0])
    for index, (k, steps) in enumerate(stretches):
        if index:
            order, schedule = resized(order, schedule, step, k)
        for _ in range(steps):
            epoch, images = expected[step]
            assert (order.epoch_of(step), order.indices(step, range(k)).tolist()) == (epoch, images)
            assert order.images_consumed(step) == consumed
            step, consumed = step + 1, consumed + k * N
    for epoch in {epoch for epoch, _ in expected}:
        seen = Counter(image for e, images in expected if e == epoch for image in images)
        assert max(seen.values()) == 1


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 300))
def test_the_rate_is_the_new_recipes_and_decays_come_with_their_epochs(k: int, new_k: int, step: int) -> None:
    order, schedule = start(k)
    step = min(step, schedule.total_steps - 1)
    order, schedule = resized(order, schedule, step, new_k)
    for later in range(step, schedule.total_steps):
        epoch = order.epoch_of(later)
        factor = 0.01 if epoch >= 6 else 0.1 if epoch >= 4 else 1.0
        if epoch >= 1:
            assert schedule.lr_at(later) == pytest.approx(0.1 * new_k * N / 8 * factor)
    assert order.epoch_of(schedule.total_steps - 1) == 7 or schedule.total_steps == step + 1
    assert schedule.total_steps >= step + 1


def test_a_larger_rate_is_reached_by_a_ramp_and_a_smaller_one_at_once() -> None:
    order, schedule = start(4)  # kn = 16, 62 steps an epoch, peak 0.2
    _, larger = resized(order, schedule, 100, 12, ramp_steps=4)
    assert [larger.lr_at(step) for step in range(100, 105)] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.6])
    _, smaller = resized(order, schedule, 100, 2, ramp_steps=4)
    assert [smaller.lr_at(step) for step in range(100, 103)] == pytest.approx([0.1] * 3)


def test_a_resize_within_a_ramp_begins_at_the_rate_that_was_reached() -> None:
    order, schedule = start(4)
    order, schedule = resized(order, schedule, 100, 12, ramp_steps=4)  # 0.3, 0.4, then
    order, schedule = resized(order, schedule, 102, 20, ramp_steps=2)
    assert [schedule.lr_at(step) for step in range(102, 105)] == pytest.approx([0.7, 1.0, 1.0])


def test_at_least_one_step_is_left() -> None:
    order, schedule = start(4)
    last = schedule.total_steps - 1
    order, schedule = resized(order, schedule, last, 200)
    assert schedule.total_steps == last + 1
    assert len(order.indices(last, range(200))) == 800


def test_a_checkpoint_holds_plain_values() -> None:
    order, schedule = start(4)
    values = vars(make_resize(order, schedule, 70, 8))
    assert all(type(value) in (int, float) for value in values.values())
    assert Resize(**values) == make_resize(order, schedule, 70, 8)


def test_workers_per_rank_stay() -> None:
    assert rescaled_workers(8, 1, 2, 3) == 12
    assert rescaled_workers(12, 3, 2, 3) == 18
    with pytest.raises(ConfigError, match="8 on 3 ranks were uneven"):
        rescaled_workers(8, 1, 3, 2)
    with pytest.raises(ConfigError, match=r"12 \(execution.workers_per_pass: 3\) on 3 ranks were uneven"):
        rescaled_workers(12, 3, 3, 2)  # 4 passes: 3, 3 and 6 workers


def test_a_minibatch_larger_than_the_set_is_refused() -> None:
    order, schedule = start(4)
    with pytest.raises(ConfigError, match="more than the 1003 training images"):
        make_resize(order, schedule, 10, 300)
