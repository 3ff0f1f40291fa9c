"""The gradient noise scale: unbiased, the same on any number of ranks, and no number of the training moved by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from run_folders import call, records, tensor_hashes, train_digits, train_digits_until_killed
from torch import Tensor, nn

from largebatch.config import Config
from largebatch.distributed.environment import Launch, connect
from largebatch.training.noise_scale import estimate
from largebatch.training.virtual_workers import VirtualWorkers

N = 3
MEASURED = "logging.noise_scale_every_steps=2"


def test_the_estimates_have_no_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, spread = torch.linspace(-1, 1, 20).double(), torch.linspace(0.5, 3, 20).double()
    small, k, trials = 4, 8, 4000
    # Each image's gradient is the truth and noise; a worker's is the mean over its images.
    workers = truth + spread * torch.randn(trials, k, 20, generator=generator).double() / math.sqrt(small)
    squares = workers.square().sum(2).mean(1)
    noise, norm = estimate(squares, workers.mean(1).square().sum(1), small, small * k)
    for found, expected in ((noise, spread.square().sum()), (norm, truth.square().sum())):
        error = found.std() / math.sqrt(trials)
        assert abs(found.mean() - expected) < 4 * error
        assert error < 0.02 * expected


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(k * N, 5, generator=generator, dtype=torch.float64), torch.arange(k * N) % 3


def measure(launch: Launch, k: int, workers_per_pass: int, bucket_mb: float) -> list[float]:
    images, labels = batch(k)
    with connect(launch, device="cpu") as ranks:
        virtual = VirtualWorkers(
            model(),
            ranks,
            virtual_workers=k,
            workers_per_pass=workers_per_pass,
            bucket_mb=bucket_mb,
            noise_images=k * N,
        )
        for step in range(2):
            with virtual.step(step, measure_noise=step == 1) as passes:
                for workers in passes:
                    chosen = slice(workers.start * N, workers.stop * N)
                    virtual.backward(F.cross_entropy(virtual(images[chosen]), labels[chosen]))
        assert virtual.noise is not None
        return virtual.noise.tolist()


def expected(k: int, workers_per_pass: int) -> tuple[float, float]:
    """tr(Σ) and |G|² from plain gradients: of each pass by itself, and of all images at once."""
    images, labels = batch(k)
    b, kn = workers_per_pass * N, k * N

    def squared_norm(start: int, stop: int) -> float:
        plain = model()
        F.cross_entropy(plain(images[start:stop]), labels[start:stop]).backward()
        return sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None)

    leaves = [squared_norm(start, start + b) for start in range(0, kn, b)]
    small, large = sum(leaves) / len(leaves), squared_norm(0, kn)
    return (small - large) / (1 / b - 1 / kn), (kn * large - b * small) / (kn - b)


@pytest.mark.parametrize(("k", "workers_per_pass"), [(6, 1), (7, 1), (8, 2), (2, 1)])
def test_it_is_the_formula_on_any_number_of_ranks(k: int, workers_per_pass: int) -> None:
    alone = run_ranks(measure, 1, k, workers_per_pass, 25.0)[0]
    assert alone == pytest.approx(expected(k, workers_per_pass), rel=1e-9)
    for world_size in {2, 3} if k > 2 else {2}:
        # Small buckets: a pass's gradients then come in parts.
        for bucket_mb in (25.0, 1e-4):
            assert run_ranks(measure, world_size, k, workers_per_pass, bucket_mb) == [alone] * world_size


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    train_digits(folder, 1, MEASURED)
    return folder


def test_a_run_records_it_and_trains_as_without(measured: Path, tmp_path: Path) -> None:
    train_digits(tmp_path, 1)
    assert tensor_hashes(tmp_path) == tensor_hashes(measured)
    names = ("gradient_noise_scale", "gradient_noise", "gradient_squared_norm")
    plain = [{key: v for key, v in record.items() if key not in names} for record in records(measured)]
    assert plain == records(tmp_path)
    # Steps 0, 2, 4, ... were measured: the last record, of step 15 alone, has none.
    for name in names:
        assert [record["step"] for record in records(measured) if name in record] == [3, 6, 8, 9, 12, 15]


def test_a_run_on_three_ranks_killed_and_resumed_records_the_same(measured: Path, tmp_path: Path) -> None:
    train_digits_until_killed(tmp_path, 3, 6, MEASURED)
    train_digits(tmp_path, 2, MEASURED)
    assert records(tmp_path) == records(measured)
    assert tensor_hashes(tmp_path) == tensor_hashes(measured)


def test_plan_says_which_minibatch_is_still_efficient(measured: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((measured / "config.yaml").read_text())
    lines = [
        '{"step": 8, "gradient_noise": 900.0, "gradient_squared_norm": 1.0}',
        '{"step": 16, "gradient_noise": 300.0, "gradient_squared_norm": 3.0}',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    said = call("plan", "--from", run)
    assert said.status == 0, said.err
    # (900 + 300) / (1 + 3) = 300: averaged before dividing. The reference minibatch of this run is 16.
    assert "gradient noise scale  300 images over steps 0 to 16 (by thirds 900, 100)" in said.out
    assert "still efficient kn    up to 256:" in said.out
    rows = [line.split() for line in said.out.splitlines() if line[:1].isdigit()]
    assert ["256", f"{1 + 256 / 300:.2f}", f"{1 + 300 / 256:.2f}"] in rows
    assert ["32", "1.11", "10.38", "this", "run"] in rows


def test_plan_from_a_run_that_did_not_measure(tmp_path: Path) -> None:
    train_digits(tmp_path, 1)
    said = call("plan", "--from", tmp_path)
    assert said.status == 2
    assert "train with logging.noise_scale_every_steps=10" in said.err
    both = call("plan", "configs/digits.yaml", "--from", tmp_path)
    assert both.status == 2
    assert "give either a CONFIG to plan, or --from RUN" in both.err


@pytest.mark.parametrize(
    "sections",
    [{"execution": {"reduction": "fast"}}, {"execution": {"workers_per_pass": 4}}, {"batch": {"virtual_workers": 1}}],
)
def test_what_cannot_be_measured_is_an_error(sections: dict[str, Any]) -> None:
    values = {"batch": {"virtual_workers": 4}, "logging": {"noise_scale_every_steps": 1}, **sections}
    with pytest.raises(ValueError, match="needs two of them"):
        Config.model_validate(values)
