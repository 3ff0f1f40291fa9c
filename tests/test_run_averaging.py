"""The average of the weights (`ema`) and the best weights (`checkpoint.keep_best`): right, and the same on any N."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from run_folders import DIGITS, SMALL, call, records, summary, tensor_hashes, train_digits, train_digits_until_killed
from torch import nn

from largebatch.training.averaging import WeightAverage
from largebatch.training.best import BestWeights
from largebatch.training.replicas import digest_of
from largebatch.training.settings import EmaSettings

KEPT = ["ema.decay=0.8", "checkpoint.keep_best=val/ema_loss", "batchnorm={statistics: precise, precise_steps: 2}"]
WEIGHTS = ("model.pt", "model_ema.pt", "model_best.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train_digits(folder, 1, *KEPT)
    return folder


@pytest.mark.parametrize("killed_on", [None, 3], ids=["through", "killed_on_3"])
def test_average_and_best_are_those_of_one_rank(alone: Path, tmp_path: Path, killed_on: int | None) -> None:
    if killed_on is not None:
        train_digits_until_killed(tmp_path, killed_on, 9, *KEPT, "checkpoint.every_steps=1")
    train_digits(tmp_path, 2 if killed_on else 3, *KEPT)
    hashes = [tensor_hashes(alone, name) for name in WEIGHTS]
    assert [tensor_hashes(tmp_path, name) for name in WEIGHTS] == hashes
    assert hashes[0] != hashes[1]
    assert (tmp_path / "samples.png").read_bytes() == (alone / "samples.png").read_bytes()
    assert records(tmp_path) == records(alone)
    for key in ("best", "ema_top1_error", "weights_sha256", "ema_weights_sha256"):
        assert summary(tmp_path)[key] == summary(alone)[key]


def test_the_files_hold_what_the_figures_say(alone: Path) -> None:
    evaluations = [line for line in records(alone) if "val/loss" in line]
    best = min(evaluations, key=lambda line: line["val/ema_loss"])
    loaded = {name: torch.load(alone / name, weights_only=True) for name in WEIGHTS}
    last = evaluations[-1]
    expected = [last["weights_sha256"], last["ema_weights_sha256"], best["ema_weights_sha256"]]
    assert [digest_of(weights) for weights in loaded.values()] == expected
    assert summary(alone)["best"] == {
        "metric": "val/ema_loss",
        "value": best["val/ema_loss"],
        "step": best["step"],
        "weights_sha256": best["ema_weights_sha256"],
    }
    for weights, expected in (("ema", last["val/ema_loss"]), ("best", best["val/ema_loss"])):
        outcome = call("evaluate", alone, "--weights", weights)
        assert json.loads(outcome.out)["val/loss"] == pytest.approx(expected, rel=1e-6)


def test_without_the_switch_nothing_is_kept(tmp_path: Path) -> None:
    short = ["schedule.epochs=1", "schedule.decay.kind=none"]
    outcome = call("train", DIGITS, "--run-dir", tmp_path, *SMALL, *short)
    assert outcome.status == 0, outcome.err
    assert not [name for name in WEIGHTS[1:] if (tmp_path / name).exists()]
    assert not [key for line in records(tmp_path) for key in line if "ema" in key]
    outcome = call("train", DIGITS, "--run-dir", tmp_path, *SMALL, "checkpoint.keep_best=val/ema_loss")
    assert outcome.status == 2
    assert "checkpoint.keep_best val/ema_loss needs an average of the weights; set ema.decay" in outcome.err


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_timms(warmup: bool) -> None:
    timm = pytest.importorskip("timm.utils")
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    ours = WeightAverage(model, EmaSettings(decay=0.7, warmup=warmup))
    theirs = timm.ModelEmaV3(model, decay=0.7, use_warmup=warmup)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 9):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(5, 3)), torch.arange(5) % 4).backward()
        optimizer.step()
        ours.update(step)
        theirs.update(model, step=step)
        assert ours.decay_after(step) == pytest.approx(theirs.get_decay(step))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with contextlib.suppress(KeyboardInterrupt), ours.in_place():
        for name, value in theirs.module.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value)
            assert value.dtype == torch.int64 or not torch.equal(value, before[name])
        raise KeyboardInterrupt
    assert digest_of(model.state_dict()) == digest_of(before), "the model's own weights are back"


def test_the_best_is_the_lowest_finite_value_and_survives_only_with_its_own_file(tmp_path: Path) -> None:
    best, model = BestWeights(tmp_path / "best.pt", "val/loss"), nn.Linear(2, 2)
    kept = []
    for step, value in enumerate([float("nan"), 0.5, float("inf"), 0.7, 0.5, 0.2]):
        model.bias.data.fill_(step)
        best.offer({"val/loss": value}, model, step=step)
        best.offer({"val/ema_loss": 0.0}, model, step=step)
        kept.append(best.state.get("step"))
    assert kept == [None, 1, 1, 1, 1, 5]
    assert float(torch.load(tmp_path / "best.pt")["bias"][0]) == 5
    for metric, state in itertools.product(("val/loss", "val/top1_error"), (best.state, {})):
        resumed = BestWeights(tmp_path / "best.pt", metric)
        resumed.restore(state)
        assert resumed.state == (best.state if state and metric == "val/loss" else {})
    for spoil in (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), Path.unlink):
        spoil(tmp_path / "best.pt")
        resumed.__init__(tmp_path / "best.pt", "val/loss")
        resumed.restore(best.state)
        assert resumed.state == {}
