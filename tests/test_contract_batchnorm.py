"""Contract 4: each worker normalises its own images; the running statistics move once a step, towards the
average over all k workers. The reference looks at what goes into each BatchNorm of a plain model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn

from largebatch.distributed.environment import Launch, Ranks, connect
from largebatch.errors import UserError
from largebatch.training.batchnorm import BatchNormStatistics
from largebatch.training.virtual_workers import VirtualWorkers

K, N, STEPS, LR, CLASSES = 6, 4, 4, 0.2, 3
SHAPE = (2, 5, 5)


def make_model() -> nn.Module:
    """Two BatchNorms of unlike size and momentum, and one that keeps no statistics."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, momentum=0.1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.Linear(5, CLASSES),
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images [k, n, C, H, W] and labels [k, n]; the workers' distributions differ."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(K, N, *SHAPE, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 3, K, dtype=torch.float64).view(K, 1, 1, 1, 1)
    return images * scale + scale, torch.randint(0, CLASSES, (K, N), generator=generator)


@dataclass(frozen=True)
class Case:
    workers_per_pass: int
    reduction: str
    momentum: float | None


CASES = {
    "running": Case(1, "reproducible", 0.9),
    "fast": Case(1, "fast", 0.9),
    "each module's own momentum": Case(1, "reproducible", None),
    "two workers a pass": Case(2, "reproducible", None),
}


class Outcome(NamedTuple):
    buffers: dict[str, np.ndarray]
    """The model's after four steps."""
    precise: np.ndarray
    """Statistics measured with the last weights."""
    buffers_after_precise: dict[str, np.ndarray]
    weights: list[np.ndarray]


def copied_buffers(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: buffer.numpy().copy() for name, buffer in model.named_buffers()}


def train(case: Case, ranks: Ranks) -> Outcome:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    virtual = VirtualWorkers(
        model,
        ranks,
        virtual_workers=K,
        workers_per_pass=case.workers_per_pass,
        reduction=case.reduction,
        batchnorm_momentum=case.momentum,
    )
    for step in range(STEPS):
        images, labels = batch(step)
        with virtual.step(step) as passes:
            for workers in passes:
                chosen = slice(workers.start, workers.stop)
                virtual.backward(F.cross_entropy(virtual(images[chosen].flatten(0, 1)), labels[chosen].flatten()))
        optimizer.step()
    buffers = copied_buffers(model)
    passes = [
        (batch(step)[0][workers.start : workers.stop].flatten(0, 1), torch.zeros(0))
        for step in (0, 1, 2)
        for workers in virtual.workers_by_pass
    ]
    precise = virtual.measure_statistics(iter(passes), 3).numpy()
    weights = [p.detach().numpy().copy() for p in model.parameters()]
    return Outcome(buffers, precise, copied_buffers(model), weights)


def train_all(launch: Launch) -> dict[str, Outcome]:
    with connect(launch, device="cpu") as ranks:
        return {name: train(case, ranks) for name, case in CASES.items()}


@functools.cache
def outcomes(world_size: int) -> list[dict[str, Outcome]]:
    return run_ranks(train_all, world_size)


class Inputs:
    """What has gone into each BatchNorm of a model that keeps statistics, pass by pass."""

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                self.of[name] = []
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: self.of[name].append(inputs[0].detach())  # type: ignore[misc]
                )

    def take(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and unbiased variance of each channel, averaged over the passes since the last time."""
        taken = {}
        for name, passes in self.of.items():
            means = [x.mean((0, 2, 3)) for x in passes]
            variances = [x.transpose(0, 1).flatten(1).var(1, unbiased=True) for x in passes]
            taken[name] = (torch.stack(means).mean(0), torch.stack(variances).mean(0))
            passes.clear()
        return taken


@functools.cache
def reference(momentum: float | None) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    """Running statistics by buffer name, weights, and precise statistics (means, then variances)."""
    model = make_model()
    inputs = Inputs(model)
    keep = {"1": 0.9 if momentum is None else momentum, "4": 0.7 if momentum is None else momentum}
    running = {
        key: value.clone() for key, value in model.state_dict().items() if "running" in key and not key.startswith("7")
    }
    for step in range(STEPS):
        images, labels = batch(step)
        model.zero_grad()
        F.cross_entropy(torch.cat([model(images[w]) for w in range(K)]), labels.flatten()).backward()
        for name, found in inputs.take().items():
            for kind, value in zip(("mean", "var"), found, strict=True):
                old = running[f"{name}.running_{kind}"]
                running[f"{name}.running_{kind}"] = keep[name] * old + (1 - keep[name]) * value
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
    measured = []
    for step in (0, 1, 2):
        for worker in range(K):
            model(batch(step)[0][worker])
        found = inputs.take()
        measured.append(torch.cat([found[name][kind] for kind in (0, 1) for name in found]))
    return running, list(model.parameters()), torch.stack(measured).mean(0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_running_statistics_move_once_a_step_towards_the_average_over_workers(name: str, world_size: int) -> None:
    running, weights, _ = reference(CASES[name].momentum)
    for ranks in outcomes(world_size):
        outcome = ranks[name]
        for key, expected in running.items():
            np.testing.assert_allclose(outcome.buffers[key], expected.numpy(), rtol=0, atol=1e-12)
        for ours, expected in zip(outcome.weights, weights, strict=True):
            np.testing.assert_allclose(ours, expected.detach().numpy(), rtol=0, atol=1e-12)
        assert outcome.buffers["1.num_batches_tracked"] == STEPS
        assert outcome.buffers["4.num_batches_tracked"] == STEPS


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_precise_statistics_are_the_average_over_steps_and_leave_the_running_ones(name: str, world_size: int) -> None:
    _, _, precise = reference(CASES[name].momentum)
    for ranks in outcomes(world_size):
        outcome = ranks[name]
        np.testing.assert_allclose(outcome.precise, precise.numpy(), rtol=0, atol=1e-11)
        for key, value in outcome.buffers.items():
            np.testing.assert_array_equal(outcome.buffers_after_precise[key], value)


def test_workers_of_one_pass_are_normalised_by_themselves() -> None:
    plain, ours = make_model(), make_model()
    with connect(Launch(), device="cpu") as ranks:
        virtual = VirtualWorkers(ours, ranks, virtual_workers=K, workers_per_pass=3)
    images, _ = batch(0)
    for first in (0, 3):
        expected = torch.cat([plain(images[w]) for w in range(first, first + 3)])
        torch.testing.assert_close(virtual(images[first : first + 3].flatten(0, 1)), expected, rtol=0, atol=1e-12)
    assert (plain(images[:3].flatten(0, 1)) - expected).abs().max() > 1e-2, "otherwise nothing was tested"
    ours.eval()
    plain.load_state_dict(ours.state_dict())
    plain.eval()
    assert torch.equal(ours(images[0]), plain(images[0]))


def test_writing_what_was_read_changes_nothing_and_evaluation_uses_it() -> None:
    model = make_model()
    statistics = BatchNormStatistics(model, workers_per_pass=1)
    values = torch.arange(1.0, 15.0, dtype=torch.float64)
    statistics.write(values)
    assert torch.equal(statistics.read(), values)
    state = model.state_dict()
    assert state["1.running_mean"].tolist() == [1, 2, 3, 4]
    assert state["4.running_mean"].tolist() == [5, 6, 7]
    assert state["1.running_var"].tolist() == [8, 9, 10, 11]
    assert state["4.running_var"].tolist() == [12, 13, 14]


def test_a_cumulative_average_needs_a_momentum() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=None))
    with pytest.raises(UserError, match=r"momentum=None.*set batchnorm\.momentum"):
        BatchNormStatistics(model, workers_per_pass=1)
    BatchNormStatistics(model, workers_per_pass=1, momentum=0.9)


def measure_with_dropout(launch: Launch) -> tuple[list[float], list[float]]:
    """Precise statistics behind a dropout, and of a model without BatchNorm."""
    images = torch.ones(N, 8)
    with connect(launch, device="cpu") as ranks:
        torch.manual_seed(launch.rank)
        model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8))
        virtual = VirtualWorkers(model, ranks, virtual_workers=K, seed=1)
        measured = virtual.measure_statistics(iter([(images, images)] * 100), 2)
        none = VirtualWorkers(nn.Linear(8, 2), ranks, virtual_workers=K)
        return measured.tolist(), none.measure_statistics(iter([(images, images)] * 100), 2).tolist()


def test_precise_statistics_draw_dropout_masks_that_do_not_depend_on_ranks() -> None:
    alone = run_ranks(measure_with_dropout, 1)[0]
    assert 0.5 < np.mean(alone[0][:8]) < 1.5
    assert len(set(alone[0][:8])) > 1
    assert alone[1] == []
    for world_size in (2, 3):
        assert run_ranks(measure_with_dropout, world_size) == [alone] * world_size
