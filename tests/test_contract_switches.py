"""Contract 11: every switch changes what it says, and the defaults are the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from largebatch.config import Config
from largebatch.data.load import load
from largebatch.distributed.environment import Launch, connect
from largebatch.plan import make_plan
from largebatch.run import make_trainer
from largebatch.training.checkpoint import CheckpointFolder
from largebatch.training.step import train_step
from largebatch.training.trainer import Trainer

K, N = 4, 6
RESNET = {"name": "resnet8", "hidden": [100] * 4, "last_gamma": 1.0}
NO_DECAY, DECAY = {"weight_decay": 0.0}, {"weight_decay": 0.1}
LR, MOMENTUM = 0.1, 0.9
FIRST_MOVE = LR * (1 + MOMENTUM)
"""What Nesterov's first update multiplies a gradient by."""


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "mlp", "hidden": [8]},
        "data": {
            "name": "synthetic",
            "synthetic": {"shape": [1, 6, 6], "classes": 3, "train_images": 60, "val_images": 12},
        },
        "batch": {"virtual_workers": K, "images_per_worker": N},
        "schedule": {"reference_batch": K * N},
    }
    return Config.model_validate({**values, **{key: {**values.get(key, {}), **new} for key, new in sections.items()}})


def trainer(**sections: dict[str, Any]) -> Trainer:
    settings = config(**sections)
    sources = load(settings.data, seed=settings.seed, device=torch.device("cpu"))
    with connect(Launch(), device="cpu") as ranks:
        plan = make_plan(settings, name="test", world_size=1, train_images=60, val_images=12)
        return make_trainer(settings, plan, ranks, sources, CheckpointFolder(Path("unused"), keep=1))


def first_update(**sections: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's tensors before and after the first update of a run."""
    run = trainer(**sections)
    before = {key: value.clone() for key, value in run.virtual.model.state_dict().items()}
    batches = run.train.stream(run.passes(range(1)), augment=True)
    run.virtual.model.train()
    train_step(
        run.virtual,
        run.optimizer,
        batches,
        step=0,
        lr=run.schedule.lr_at(0),
        autocast=run.autocast,
        loss_scale=run.loss_scale,
        loss_factor=run.loss_factor * run.schedule.loss_scale,
    )
    return before, run.virtual.model.state_dict()


def moves(**sections: dict[str, Any]) -> dict[str, Tensor]:
    before, after = first_update(**sections)
    return {key: after[key] - before[key] for key in before}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)


def times(factor: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: factor * value for key, value in tensors.items()}


def test_the_defaults_are_the_papers() -> None:
    defaults = Config()
    assert defaults.schedule.model_dump() == {
        "reference_lr": 0.1,
        "reference_batch": 256,
        "lr_rule": "linear",
        "scale": "lr",
        "warmup": {"kind": "gradual", "epochs": 5.0, "start_lr": None},
        "decay": {"kind": "step", "epochs": [30.0, 60.0, 80.0], "factor": 0.1, "final_lr": 0.0},
        "epochs": 90.0,
        "resize_ramp_epochs": 0.25,
    }
    assert defaults.optimizer.model_dump() == {
        "kind": "sgd",
        "trust_coefficient": 0.001,
        "momentum": 0.9,
        "nesterov": True,
        "betas": [0.9, 0.999],
        "epsilon": 1e-8,
        "weight_decay": 1e-4,
        "decay_batchnorm": False,
        "no_decay": [],
        "momentum_form": "lr_outside",
        "clip_norm": None,
        "clip_value": None,
        "layer_decay": 1.0,
    }
    assert defaults.batch.images_per_worker == 32
    assert defaults.batch.loss_mean_over == "global_batch"
    assert defaults.batch.shuffle == "once"
    assert defaults.batch.on_resize == "keep"
    assert defaults.batchnorm.momentum == 0.9
    assert defaults.model.name == "resnet50"
    assert defaults.model.last_gamma == 0.0
    assert defaults.execution.workers_per_pass == 1


def test_loss_mean_over_images_per_worker_makes_gradients_k_times_larger() -> None:
    right, wrong = moves(optimizer=NO_DECAY), moves(optimizer=NO_DECAY, batch={"loss_mean_over": "images_per_worker"})
    assert_close(wrong, times(K, right))
    assert max(value.abs().max() for value in right.values()) > 1e-3


def test_with_weight_decay_cancelling_k_is_not_the_same() -> None:
    """Remark 3: decay does not grow with the gradients."""
    start, _ = first_update()
    wrong = {"loss_mean_over": "images_per_worker"}
    for batch in ({}, wrong):
        undecayed, decayed = moves(optimizer=NO_DECAY, batch=batch), moves(optimizer=DECAY, batch=batch)
        expected = {key: undecayed[key] - FIRST_MOVE * 0.1 * start[key] for key in start}
        assert_close(decayed, expected)


def test_scaling_the_loss_equals_scaling_the_rate_only_without_weight_decay() -> None:
    """Remark 1."""
    schedule = {"reference_batch": K * N // 4, "warmup": {"kind": "none"}}
    plain = moves(optimizer=NO_DECAY)
    for scale in ("lr", "loss"):
        assert_close(moves(optimizer=NO_DECAY, schedule={**schedule, "scale": scale}), times(4, plain))
    start, _ = first_update()
    for scale, decay_grows in (("lr", 4), ("loss", 1)):
        decayed = moves(optimizer=DECAY, schedule={**schedule, "scale": scale})
        expected = {key: 4 * plain[key] - decay_grows * FIRST_MOVE * 0.1 * start[key] for key in start}
        assert_close(decayed, expected)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_lr_rule(rule: str, factor: float) -> None:
    schedule = {"reference_batch": K * N // 4, "lr_rule": rule, "warmup": {"kind": "none"}}
    assert_close(moves(optimizer=NO_DECAY, schedule=schedule), times(factor, moves(optimizer=NO_DECAY)))


@pytest.mark.parametrize(
    ("kind", "rates"), [("gradual", [0.1, 0.1 + 0.3 / 4, 0.4]), ("constant", [0.1, 0.1, 0.4]), ("none", [0.4] * 3)]
)
def test_warmup(kind: str, rates: list[float]) -> None:
    schedule = trainer(
        schedule={"reference_batch": K * N // 4, "warmup": {"kind": kind, "epochs": 2}}  # two steps an epoch
    ).schedule
    assert [schedule.lr_at(step) for step in (0, 1, 4)] == pytest.approx(rates)


def test_nesterov_and_momentum_form_choose_the_update() -> None:
    nesterov = moves(optimizer=NO_DECAY)
    assert_close(moves(optimizer={**NO_DECAY, "nesterov": False}), times(1 / (1 + MOMENTUM), nesterov))
    for form in ("lr_inside", "lr_inside_uncorrected"):
        assert_close(moves(optimizer={**NO_DECAY, "momentum_form": form}), nesterov)
    inside = trainer(optimizer={"momentum_form": "lr_inside"}).optimizer
    assert type(inside) is not type(trainer().optimizer)


def test_shuffle_once_or_by_every_worker() -> None:
    def images(shuffle: str) -> list[int]:
        run = trainer(batch={"shuffle": shuffle})
        return [int(i) for one in run.passes(range(run.order.steps_per_epoch)) for i in one.indices]

    assert len(set(images("once"))) == len(images("once")) == 48
    assert len(set(images("per_worker"))) < len(images("per_worker")) == 48


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_last_gamma(gamma: float) -> None:
    before, _ = first_update(model={**RESNET, "last_gamma": gamma})
    gammas = {key: value for key, value in before.items() if ".bn2.weight" in key}
    assert len(gammas) == 3
    assert all((value == gamma).all() for value in gammas.values())
    assert (before["bn1.weight"] == 1).all()


def resnet_update(**sections: dict[str, Any]) -> dict[str, Tensor]:
    return moves(model=RESNET, **sections)


def test_decay_batchnorm() -> None:
    spared, decayed, undecayed = (
        resnet_update(optimizer=settings) for settings in (DECAY, {**DECAY, "decay_batchnorm": True}, NO_DECAY)
    )
    assert_close({"bn1.weight": spared["bn1.weight"]}, {"bn1.weight": undecayed["bn1.weight"]})
    ones = torch.ones_like(spared["bn1.weight"])
    assert_close(decayed, {"bn1.weight": spared["bn1.weight"] - FIRST_MOVE * 0.1 * ones})
    assert_close(decayed, {"conv1.weight": spared["conv1.weight"], "fc.weight": spared["fc.weight"]})


def test_batchnorm_momentum_is_the_weight_of_the_old_average() -> None:
    slow, quick = (resnet_update(batchnorm={"momentum": m})["bn1.running_mean"] for m in (0.9, 0.5))
    torch.testing.assert_close(quick, 5 * slow, rtol=1e-4, atol=1e-7)
    assert slow.abs().max() > 1e-4


def test_ways_of_execution_change_rounding_only() -> None:
    plain = resnet_update()
    for execution in ({"channels_last": True}, {"workers_per_pass": 2}, {"reduction": "fast"}, {"bucket_mb": 0.001}):
        other = resnet_update(execution=execution)
        for key, value in plain.items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4)
    low = resnet_update(execution={"precision": "bf16"})["conv1.weight"]
    assert 0 < (low - plain["conv1.weight"]).abs().max() < 0.1


def test_channels_last_reaches_weights_and_images() -> None:
    run = trainer(model=RESNET, execution={"channels_last": True})
    assert run.virtual.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert run.memory_format == torch.channels_last
    assert trainer().memory_format == torch.contiguous_format


def test_precise_statistics_are_there_for_evaluation_only() -> None:
    for statistics, changes in (("running", False), ("precise", True)):
        run = trainer(model=RESNET, batchnorm={"statistics": statistics})
        run.virtual.model.train()
        before = run.virtual.batchnorm.read()
        with run.evaluation_statistics():
            assert torch.equal(run.virtual.batchnorm.read(), before) != changes
        assert torch.equal(run.virtual.batchnorm.read(), before)
