"""Contracts 3, 4 and 8 and mixed precision where they meet: in whole runs on real processes."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

from largebatch.config import Config
from largebatch.data.load import load
from largebatch.data.source import Batches, ImageSource, Pass
from largebatch.distributed.environment import Launch, Ranks, connect
from largebatch.models.build import build
from largebatch.models.settings import ModelSettings
from largebatch.plan import make_plan
from largebatch.recipe.order import permutation
from largebatch.report.metrics import open_writers
from largebatch.report.progress import Progress
from largebatch.run import make_trainer, train
from largebatch.training.checkpoint import CheckpointFolder
from largebatch.training.precision import LossScale
from largebatch.training.step import train_step
from largebatch.training.trainer import Trainer

K, N, TRAIN_IMAGES, VAL_IMAGES, CLASSES, EPOCHS = 4, 5, 47, 33, 7, 2
STEPS_PER_EPOCH = TRAIN_IMAGES // (K * N)


def config(**sections: dict[str, Any]) -> Config:
    """A run of four steps."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "resnet8", "last_gamma": 1.0},
        "data": {
            "name": "synthetic",
            "augmentation": {"padding": 2},
            "synthetic": {
                "shape": [3, 8, 8],
                "classes": CLASSES,
                "train_images": TRAIN_IMAGES,
                "val_images": VAL_IMAGES,
            },
        },
        "batch": {"virtual_workers": K, "images_per_worker": N},
        "schedule": {"epochs": EPOCHS, "reference_batch": 10, "warmup": {"epochs": 1}, "decay": {"kind": "none"}},
        "evaluation": {"images_per_batch": 10},
    }
    return Config.model_validate({**values, **sections})


def trainer_of(settings: Config, ranks: Ranks, sources: tuple[ImageSource, ImageSource], folder: str) -> Trainer:
    plan = make_plan(
        settings, name="test", world_size=ranks.world_size, train_images=sources[0].images, val_images=VAL_IMAGES
    )
    return make_trainer(settings, plan, ranks, sources, CheckpointFolder(Path(folder), keep=1))


def load_sources(settings: Config) -> tuple[ImageSource, ImageSource]:
    return load(settings.data, seed=settings.seed, device=torch.device("cpu"))


# ---- contract 3: pixels


class Recorder:
    """A source that remembers a hash of every training image that it gave."""

    def __init__(self, source: ImageSource) -> None:
        self.images, self.classes, self.shape = source.images, source.classes, source.shape
        self.mean, self.std = source.mean, source.std
        self.skipped = 0
        self.seen: list[tuple[int, int, str]] = []
        self._source = source

    def stream(self, passes: Iterable[Pass], *, augment: bool) -> Batches:
        """What the source gives."""
        given = list(passes)
        for one, (images, labels) in zip(given, self._source.stream(given, augment=augment), strict=True):
            for index, image in zip(one.indices.tolist(), images, strict=True):
                digest = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
                self.seen.append((one.epoch, index, digest))
            yield images, labels


def record_pixels(launch: Launch, folder: str, workers_per_pass: int) -> list[tuple[int, int, str]]:
    settings = config(execution={"workers_per_pass": workers_per_pass, "device": "cpu"})
    train_source, validation = load_sources(settings)
    recorder = Recorder(train_source)
    with connect(launch, device="cpu") as ranks:
        trainer = trainer_of(settings, ranks, (recorder, validation), folder)
        trainer.run(open_writers(Path(folder), is_main=False, first_step=0), Progress())
    return recorder.seen


@functools.cache
def pixels(folder: str, world_size: int, workers_per_pass: int) -> list[list[tuple[int, int, str]]]:
    return run_ranks(record_pixels, world_size, folder, workers_per_pass)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(("world_size", "workers_per_pass"), [(2, 1), (3, 1), (4, 1), (1, 2), (2, 2)])
def test_an_image_has_the_same_pixels_in_an_epoch_whoever_sees_it(
    world_size: int, workers_per_pass: int, folder: str
) -> None:
    (alone,) = pixels(folder, 1, 1)
    assert len(alone) == EPOCHS * STEPS_PER_EPOCH * K * N
    seen = [image for rank in pixels(folder, world_size, workers_per_pass) for image in rank]
    assert Counter(seen) == Counter(alone)
    assert max(Counter((epoch, index) for epoch, index, _ in seen).values()) == 1


def test_pixels_change_from_epoch_to_epoch(folder: str) -> None:
    by_image: dict[int, set[str]] = {}
    for _, index, digest in pixels(folder, 1, 1)[0]:
        by_image.setdefault(index, set()).add(digest)
    assert sum(len(digests) for digests in by_image.values()) > 1.5 * len(by_image)


# ---- contract 4: what is evaluated is what is exported


def train_to_the_end(launch: Launch, settings: Config, run_dir: str) -> dict[str, Any]:
    return train(settings, Path(run_dir), name="test", resume="never", launch=launch)


def exported(run_dir: Path) -> nn.Module:
    """The run's weights in the plain model, which no part of training has touched."""
    model = build(ModelSettings(name="resnet8"), classes=CLASSES, shape=(3, 8, 8), seed=99)
    model.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True), strict=True)
    return model


def evaluate_plainly(model: nn.Module, source: ImageSource) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        ((images, labels),) = source.stream([Pass(0, np.arange(VAL_IMAGES))], augment=False)
        logits = model(images)
    return {
        "val/loss": F.cross_entropy(logits, labels).item(),
        "val/top1_error": 100 * (logits.argmax(1) != labels).double().mean().item(),
    }


def statistics_by_hand(model: nn.Module, settings: Config, steps: int) -> dict[str, torch.Tensor]:
    """Mean and unbiased variance of what goes into each BatchNorm, over the last epoch's last steps."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def look(_: nn.Module, inputs: tuple[torch.Tensor], name: str = name) -> None:
                columns = inputs[0].detach().double().transpose(0, 1).flatten(1)
                found.setdefault(f"{name}.running_mean", []).append(columns.mean(1))
                found.setdefault(f"{name}.running_var", []).append(columns.var(1, unbiased=True))

            module.register_forward_pre_hook(look)
    model.train()
    last = EPOCHS - 1
    whole = TRAIN_IMAGES - TRAIN_IMAGES % (K * N)
    rows = permutation(TRAIN_IMAGES, settings.seed, last, 0)[whole - steps * K * N : whole].reshape(-1, N)
    with torch.no_grad():
        for images, _ in load_sources(settings)[0].stream([Pass(last, row) for row in rows], augment=True):
            model(images)
    return {key: torch.stack(values).mean(0) for key, values in found.items()}


@pytest.mark.parametrize(
    "statistics",
    [
        "running",
        "precise",
    ],
)
def test_the_exported_weights_evaluate_as_the_run_did(statistics: str, tmp_path: Path) -> None:
    settings = config(
        batchnorm={"statistics": statistics, "precise_steps": 1},
        execution={"device": "cpu"},
        optimizer={"weight_decay": 0.01},
    )
    summary, _ = run_ranks(train_to_the_end, 2, settings, str(tmp_path))
    model = exported(tmp_path)
    plain = evaluate_plainly(model, load_sources(settings)[1])
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {key: last[key] for key in plain} == pytest.approx(plain, rel=1e-5)
    assert summary["top1_error"] == pytest.approx(plain["val/top1_error"], abs=1e-9)
    assert summary["val_images"] == VAL_IMAGES
    by_hand = statistics_by_hand(exported(tmp_path), settings, steps=1)
    buffers = model.state_dict()
    same = [torch.allclose(buffers[key].double(), value, rtol=1e-4, atol=1e-5) for key, value in by_hand.items()]
    assert len(same) == 2 * 7
    assert all(same) if statistics == "precise" else not any(same)


# ---- mixed precision


def train_in_fp16(launch: Launch, folder: str) -> list[tuple[str, float]]:
    """After each of six steps: a hash of weights and buffers, and the loss scale."""
    settings = config(execution={"precision": "fp16", "device": "cpu"}, schedule={"warmup": {"kind": "none"}})
    sources = load_sources(settings)
    states = []
    with connect(launch, device="cpu") as ranks:
        trainer = trainer_of(settings, ranks, sources, folder)
        # Two steps whose gradients overflow, then some that do not.
        trainer.loss_scale.scale = torch.tensor(2.0**20)
        LossScale._GROWTH_STEPS = 3
        batches = sources[0].stream(trainer.passes(range(6)), augment=True)
        for step in range(6):
            train_step(
                trainer.virtual,
                trainer.optimizer,
                batches,
                step=step,
                lr=0.05,
                autocast=trainer.autocast,
                loss_scale=trainer.loss_scale,
            )
            weights = b"".join(p.detach().numpy().tobytes() for p in trainer.virtual.model.parameters())
            states.append((hashlib.sha256(weights).hexdigest(), float(trainer.loss_scale.scale)))
    return states


def test_fp16_skips_a_step_that_overflows_on_all_ranks_alike(folder: str) -> None:
    alone = run_ranks(train_in_fp16, 1, folder)[0]
    weights, scales = zip(*alone, strict=True)
    skipped = [step for step in range(1, 6) if weights[step] == weights[step - 1]]
    assert skipped == [1, 5], "the first two steps leave the weights of the start"
    assert scales == (2.0**19, 2.0**18, 2.0**18, 2.0**18, 2.0**19, 2.0**18), "it grows after three good steps"
    for world_size in (2, 3):
        assert run_ranks(train_in_fp16, world_size, folder) == [alone] * world_size
