"""Contract 6: the learning rate as tables of values, worked out by hand from §2.1, §2.2 and §5.1."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from largebatch.recipe.schedule import Schedule, ScheduleSettings, make_schedule, scale_factor

STEPS_PER_EPOCH = 156  # ImageNet's 1,281,167 images in minibatches of 8192


def schedule(global_batch: int = 8192, steps_per_epoch: int = STEPS_PER_EPOCH, **settings: Any) -> Schedule:
    return make_schedule(
        ScheduleSettings.model_validate(settings), global_batch=global_batch, steps_per_epoch=steps_per_epoch
    )


def test_gradual_warmup_of_the_paper() -> None:
    rates = schedule()
    table = {0: 0.1, 1: 0.1 + 3.1 / 780, 390: 1.65, 400: 1.690, 779: 3.2 - 3.1 / 780, 780: 3.2, 781: 3.2}
    assert {step: round(rates.lr_at(step), 3) for step in table} == {s: round(v, 3) for s, v in table.items()}
    differences = [rates.lr_at(step + 1) - rates.lr_at(step) for step in range(780)]
    assert max(differences) == pytest.approx(min(differences)), "a constant amount at each iteration"
    assert rates.lr_at(780) == pytest.approx(3.2, rel=1e-15)


def test_decay_at_30_60_80_epochs() -> None:
    rates = schedule()
    first, second, third = 30 * 156, 60 * 156, 80 * 156
    table = {
        first - 1: 3.2,
        first: 0.32,
        second - 1: 0.32,
        second: 0.032,
        third - 1: 0.032,
        third: 0.0032,
        90 * 156 - 1: 0.0032,
    }
    assert {step: pytest.approx(rates.lr_at(step)) for step in table} == table
    assert rates.total_steps == 90 * 156


def test_constant_warmup_and_none() -> None:
    constant, none = schedule(warmup={"kind": "constant"}), schedule(warmup={"kind": "none"})
    assert [constant.lr_at(step) for step in (0, 400, 779)] == [0.1] * 3
    assert [constant.lr_at(step) for step in (780, 781)] == pytest.approx([3.2] * 2)
    assert [none.lr_at(step) for step in (0, 400, 779, 780)] == pytest.approx([3.2] * 4)
    for rates in (constant, none):
        assert rates.lr_at(30 * 156) == pytest.approx(0.32)


@pytest.mark.parametrize("global_batch", [64, 128, 256])
@pytest.mark.parametrize("kind", ["gradual", "constant"])
def test_no_warmup_at_or_below_the_reference_minibatch(global_batch: int, kind: str) -> None:
    rates = schedule(global_batch, warmup={"kind": kind})
    assert rates.warmup_steps == 0
    assert rates.lr_at(0) == pytest.approx(0.1 * global_batch / 256)


@pytest.mark.parametrize(("rule", "peak"), [("linear", 3.2), ("sqrt", 0.1 * math.sqrt(32)), ("none", 0.1)])
def test_rules_of_table_2a(rule: str, peak: float) -> None:
    rates = schedule(lr_rule=rule)
    assert rates.peak_lr == pytest.approx(peak)
    assert rates.lr_at(780) == pytest.approx(peak)
    assert scale_factor(rule, 8192, 256) == pytest.approx(peak / 0.1)


def test_a_loss_scaled_instead_leaves_the_rate_alone() -> None:
    wrong = schedule(scale="loss")
    assert [wrong.lr_at(step) for step in (0, 780)] == [0.1, 0.1]
    assert wrong.loss_scale == 32
    assert schedule().loss_scale == 1


def test_cosine_from_the_end_of_the_warmup_to_zero() -> None:
    rates = schedule(decay={"kind": "cosine"})
    steps = 85 * 156
    assert rates.lr_at(0) == 0.1
    assert rates.lr_at(400) == pytest.approx(1.690, abs=5e-4)
    for done in (0.0, 0.25, 0.5, 0.75):
        step = 780 + round(done * steps)
        assert rates.lr_at(step) == pytest.approx(1.6 * (1 + math.cos(math.pi * (step - 780) / steps)))
    assert 0 < rates.lr_at(90 * 156 - 1) < 1e-6
    assert rates.lr_at(90 * 156) == pytest.approx(0, abs=1e-15)


def test_start_and_final_rates_that_are_given_hold_for_any_minibatch() -> None:
    for global_batch in (128, 8192):
        rates = schedule(global_batch, warmup={"start_lr": 0.001}, decay={"kind": "cosine", "final_lr": 0.01})
        peak = 0.1 * global_batch / 256
        table = {0: 0.001, 390: (0.001 + peak) / 2, 780: peak, (780 + 14040) // 2: (peak + 0.01) / 2, 14040: 0.01}
        assert {step: pytest.approx(rates.lr_at(step)) for step in table} == table


def test_no_decay_stays_at_the_peak() -> None:
    rates = schedule(decay={"kind": "none"})
    assert [rates.lr_at(step) for step in (780, 5000, 14039)] == pytest.approx([3.2] * 3)


def test_epochs_become_whole_steps() -> None:
    rates = schedule(512, 10, epochs=2.5, warmup={"epochs": 0.34}, decay={"epochs": [1.26]})
    assert (rates.total_steps, rates.warmup_steps, rates.decay_steps) == (25, 3, (13,))
    assert [rates.lr_at(step) for step in range(4)] == pytest.approx([0.1, 0.1 + 0.1 / 3, 0.1 + 0.2 / 3, 0.2])
    assert [rates.lr_at(step) for step in (12, 13)] == pytest.approx([0.2, 0.02])
    assert schedule(512, 1, epochs=0.2, warmup={"epochs": 0.1}, decay={"kind": "none"}).total_steps == 1


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"decay": {"epochs": [60, 30]}}, "ascending"),
        ({"decay": {"epochs": [0, 30]}}, "positive"),
        ({"decay": {"epochs": [30, 90]}}, "never happen"),
        ({"warmup": {"epochs": 91}}, "longer than"),
        ({"warmup": {"start_lr": 0.2}}, "starts from a smaller one"),
    ],
)
def test_schedules_that_cannot_be_meant(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        ScheduleSettings.model_validate(settings)
