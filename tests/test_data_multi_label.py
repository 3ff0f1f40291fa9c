"""Own sets whose images have any number of the classes: trained and evaluated alike on any ranks, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from run_folders import ROOT, call, call_on, records, summary
from torch import Tensor

from largebatch.config import read_config
from largebatch.data.load import load
from largebatch.data.source import Pass
from largebatch.models.build import build

INSTANT = str(ROOT / "configs/instant/resnet8_fp32.yaml")
CLASSES = 7
MULTI = ["data.multi_label=true", "loss.name=bce"]


def make(images: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(images, CLASSES, generator=generator) < 0.3).long()
    noise = torch.randint(0, 100, (images, 3, 8, 8), generator=generator)
    noise[:, 0, :CLASSES] += 150 * labels[:, :, None]  # a row of each class
    return noise.to(torch.uint8), labels


def tensors(**_: Any) -> Any:
    return make(80, 1), make(30, 2)


class Items:
    classes = tuple("abcdefg")

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.labels = make(images, seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, list[int]]:
        return self.images[index], self.labels[index].tolist()


def items() -> Any:
    return Items(80, 1), Items(30, 2)


def single() -> Any:
    return (make(80, 1)[0], torch.arange(80) % CLASSES), make(30, 2)


def wrong_values() -> Any:
    (images, labels), val = tensors()
    return (images, labels * 2), val


def own(name: str, *overrides: str) -> list[str]:
    return [f"data.name={__name__}:{name}", "batch.images_per_worker=4", *overrides]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("tensors", ["data.augmentation={kind: crop, padding: 1, mixup_alpha: 0.4}"]),
        ("items", ["data={image_size: 8, loader_processes: 0, augmentation: {kind: none}}"]),
    ],
)
def test_trained_and_evaluated_the_same_on_any_ranks(name: str, overrides: list[str], tmp_path: Path) -> None:
    arguments = own(name, *MULTI, *overrides)
    one, three = tmp_path / "one", tmp_path / "three"
    outcome = call("train", INSTANT, "--run-dir", one, *arguments)
    assert outcome.status == 0, outcome.err
    assert {outcome.status for outcome in call_on(3, "train", INSTANT, "--run-dir", three, *arguments)} == {0}
    assert summary(one)["weights_sha256"] == summary(three)["weights_sha256"]
    assert records(one) == records(three)

    config = read_config(one / "config.yaml")
    _, validation = load(config.data, seed=config.seed, device=torch.device("cpu"))
    model = build(config.model, classes=CLASSES, shape=validation.shape, seed=0).eval()
    model.load_state_dict(torch.load(one / "model.pt", weights_only=True))
    ((images, labels),) = validation.stream([Pass(0, np.arange(30))], augment=False)
    with torch.no_grad():
        scores = model(images)
    ranked = labels.gather(1, scores.argsort(1, descending=True))
    last = records(one)[-1]
    expected = {
        "val/loss": F.binary_cross_entropy_with_logits(scores, labels).item(),
        "val/top1_error": 100 * (ranked[:, 0] == 0).double().mean().item(),
        "val/top5_error": 100 * (ranked[:, :5].sum(1) == 0).double().mean().item(),
    }
    assert {key: last[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["val/top1_error"] < 100

    outcome = call("evaluate", one, "--per-class", "--out", tmp_path)
    assert outcome.status == 0, outcome.err
    counts = np.loadtxt(tmp_path / "confusion.csv", delimiter=",", skiprows=1, usecols=range(1, CLASSES + 1))
    assert (counts == labels.T.numpy() @ F.one_hot(scores.argmax(1), CLASSES).numpy()).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (own("single", *MULTI), "labels must be 0 or 1 for each class, [80, 7], not torch.int64 [80]; set"),
        (own("wrong_values", *MULTI), "[80, 7], not torch.int64 [80, 7] with other values"),
        (own("tensors"), "labels must be integers [80], not torch.int64 [80, 7]; for any number of classes"),
        (own("tensors", *MULTI, "data.classes=9"), "[80, 9], not torch.int64 [80, 7]; set data.classes"),
        (own("tensors", MULTI[0]), "data.multi_label has independent classes: it needs loss.name bce"),
        (["data.multi_label=true"], "data: multi_label is for a set of your own; synthetic has one class"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    outcome = call("train", INSTANT, "--run-dir", tmp_path, *arguments)
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
