"""The promise: what a run computes does not depend on how many processes ran it.

Every run here is the command line on real processes that meet over gloo.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from run_folders import records, scalars, summary, tensor_hashes, train_digits
from torch import nn

from largebatch.cli import main
from largebatch.distributed.environment import Launch, connect
from largebatch.models.build import build
from largebatch.models.settings import ModelSettings
from largebatch.recipe.draws import uniform
from largebatch.training.virtual_workers import VirtualWorkers

K6 = "batch.virtual_workers=6"
BF16 = "execution={precision: bf16, channels_last: true}"


def assert_same_run(one: Path, other: Path) -> None:
    """Weights and buffers to the last bit, and every figure that no clock had a part in."""
    hashes = tensor_hashes(one)
    assert len(hashes) == 7 + 7 * 5 + 2  # convolutions, BatchNorms, the last layer
    assert tensor_hashes(other) == hashes
    assert records(other) == records(one)
    assert scalars(other) == scalars(one)
    for key in ("top1_error", "top1_error_median_last5", "val_images", "steps", "global_batch", "peak_lr"):
        assert summary(other)[key] == summary(one)[key]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """k = 8 on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    train_digits(folder, 1)
    return folder


def test_the_run_is_one_worth_comparing(alone: Path) -> None:
    lines = records(alone)
    assert [line["step"] for line in lines] == [3, 6, 8, 9, 12, 15, 16]
    assert [line["step"] for line in lines if "val/loss" in line] == [8, 16]
    # The reference 0.1 for 16 images is 0.2 for 32; a warmup of 4 steps; a tenth from step 12 on.
    assert [line["lr"] for line in lines] == pytest.approx([0.15, 0.2, 0.2, 0.2, 0.2, 0.02, 0.02])
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert summary(alone)["val_images"] == 101


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_reproducible_weights_and_figures_are_those_of_one_rank(alone: Path, tmp_path: Path, world_size: int) -> None:
    train_digits(tmp_path, world_size)
    assert summary(tmp_path)["world_size"] == world_size
    assert len(json.loads((tmp_path / "plan.json").read_text())["workers_on_rank"]) == world_size
    assert_same_run(alone, tmp_path)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        pytest.param(4, [K6], id="k6_on_4"),
        pytest.param(3, [BF16], id="bf16_channels_last_on_3"),
        pytest.param(2, ["execution.precision=fp16"], id="fp16_on_2"),
        pytest.param(3, ["execution.workers_per_pass=2"], id="two_workers_per_pass_on_3"),
        pytest.param(2, ["batchnorm.statistics=precise", "batchnorm.precise_steps=3"], id="precise_batchnorm_on_2"),
    ],
)
def test_reproducible_holds_for_every_way_to_execute(tmp_path: Path, world_size: int, overrides: list[str]) -> None:
    shorter = ["schedule.epochs=1", "schedule.decay.kind=none", *overrides]
    train_digits(tmp_path / "one", 1, *shorter)
    train_digits(tmp_path / "many", world_size, *shorter)
    assert_same_run(tmp_path / "one", tmp_path / "many")


COMPILED = """
model: {name: resnet20, width: 32}
data: {name: synthetic, synthetic: {shape: [3, 16, 16], train_images: 48, val_images: 16}}
batch: {virtual_workers: 4, images_per_worker: 4}
schedule: {reference_lr: 0.1, reference_batch: 16, epochs: 1, warmup: {kind: none}, decay: {kind: none}}
execution: {compile: true, precision: bf16, device: cpu}
"""


def test_reproducible_holds_for_a_compiled_model_in_bf16_at_any_bucket_size(tmp_path: Path) -> None:
    """1.07 million parameters, so that DDP has several buckets; real code from inductor."""
    (tmp_path / "c.yaml").write_text(COMPILED)
    for name, world_size, bucket_mb in [("one", 1, 25), ("two", 2, 25), ("small", 2, 0.5)]:
        command = ["train", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / name)]
        arguments = [*command, f"execution.bucket_mb={bucket_mb}"]
        assert run_ranks(_main, world_size, arguments, timeout=400.0) == [0] * world_size
    for name in ("two", "small"):
        assert tensor_hashes(tmp_path / name) == tensor_hashes(tmp_path / "one")
        assert records(tmp_path / name) == records(tmp_path / "one")


def _main(_: Launch, arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fast_is_equal_within_rounding(alone: Path, tmp_path: Path, world_size: int) -> None:
    train_digits(tmp_path, world_size, "execution.reduction=fast")
    expected = torch.load(alone / "model.pt", weights_only=True)
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert [line["lr"] for line in records(tmp_path)] == [line["lr"] for line in records(alone)]
    losses = [[line["train/loss"] for line in records(folder)] for folder in (tmp_path, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _model() -> nn.Module:
    return build(ModelSettings(name="resnet8"), classes=10, shape=(1, 8, 8), seed=1).double()


def _flat(model: nn.Module) -> np.ndarray:
    return torch.cat([value.detach().double().flatten() for value in model.state_dict().values()]).numpy()


def _train_in_float64(launch: Launch, reduction: str) -> np.ndarray:
    """Four steps of 8 workers with 4 random images each; all weights and buffers as one array."""
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    with connect(launch, device="cpu") as ranks:
        virtual = VirtualWorkers(model, ranks, virtual_workers=8, reduction=reduction)
        for step in range(4):
            pixels = uniform(np.arange(8 * 4 * 64), 7, step).reshape(8, 4, 1, 8, 8) - 0.5
            with virtual.step(step) as passes:
                for workers in passes:
                    images = torch.from_numpy(np.concatenate([pixels[worker] for worker in workers]))
                    labels = (images.sum(dim=(1, 2, 3)) > 0).long()
                    virtual.backward(F.cross_entropy(virtual(images), labels))
            optimizer.step()
    return _flat(model)


def test_fast_is_equal_within_1e_10_in_float64() -> None:
    alone = _train_in_float64(Launch(), "reproducible")
    assert not np.allclose(alone, _flat(_model()), atol=1e-3), "training moved the weights"
    for world_size in (1, 2, 3):
        for weights in run_ranks(_train_in_float64, world_size, "fast"):
            np.testing.assert_allclose(weights, alone, rtol=0, atol=1e-10)
