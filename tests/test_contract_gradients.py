"""Contract 1 and the promise of `reproducible`, on real processes: the gradient is that of the mean loss over
kn images, whatever N is, and with exact sums it is the same to the last bit."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn

from largebatch.distributed.environment import Launch, Ranks, connect
from largebatch.distributed.exact import WIDE_STEPS
from largebatch.errors import ConfigError, UserError
from largebatch.recipe.batch import Deal
from largebatch.training.optimizer import update_unless
from largebatch.training.precision import make_autocast
from largebatch.training.virtual_workers import VirtualWorkers

IMAGES_PER_WORKER, SHAPE, CLASSES, STEPS, LR = 3, (3, 6, 6), 5, 3, 0.1


class Tied(nn.Module):
    """A parameter that is used twice, and one of a single element."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(108, 108)
        self.outer = nn.Linear(108, CLASSES)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        once = torch.tanh(self.inner(images.flatten(1)))
        return self.outer(torch.tanh(self.inner(once))) * self.temperature


def layernorm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, CLASSES))


def frozen() -> nn.Module:
    model = layernorm()
    model[1].requires_grad_(False)
    return model


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, (3, 2), groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 24), nn.Dropout(0.5), nn.BatchNorm1d(24), nn.Linear(24, CLASSES))


@dataclass(frozen=True)
class Case:
    """What is trained for three steps."""

    model: Callable[[], nn.Module]
    k: int
    reduction: str = "reproducible"
    workers_per_pass: int = 1
    bucket_mb: float = 25.0
    channels_last: bool = False
    precision: str = "fp64"
    gradient_as_bucket_view: bool = False
    steps: int = 3
    random_deal: bool = False
    spike: int | None = None
    """The step whose loss is multiplied by 2^20, which no unit expects."""

    @property
    def ranks(self) -> range:
        return range(1, min(4, self.k // self.workers_per_pass) + 1)


TINY = 1e-6  # MiB: a bucket for every parameter
CASES = {
    "fast": Case(layernorm, 8, "fast"),
    "fast, k=5": Case(convolutions, 5, "fast"),
    "fast, buckets": Case(convolutions, 8, "fast", bucket_mb=TINY, channels_last=True),
    "fast, two workers a pass": Case(convolutions, 8, "fast", workers_per_pass=2),
    "exact": Case(layernorm, 8),
    "exact, BatchNorm": Case(convolutions, 8),
    "exact, k=5": Case(convolutions, 5),
    "exact, buckets": Case(convolutions, 7, bucket_mb=TINY),
    "exact, channels_last": Case(convolutions, 8, channels_last=True),
    "exact, channels_last, buckets": Case(convolutions, 7, channels_last=True, bucket_mb=TINY),
    "exact, two workers a pass": Case(convolutions, 8, workers_per_pass=2),
    "exact, frozen parameters": Case(frozen, 7, bucket_mb=TINY),
    "exact, tied parameters": Case(Tied, 8, bucket_mb=TINY),
}
# Equal to the last bit on 1 to 6 ranks.
STEPS_TO_NARROW = WIDE_STEPS + 3
BITWISE = {
    "k=8": Case(convolutions, 8, precision="fp32", steps=STEPS_TO_NARROW),
    "k=7, buckets": Case(convolutions, 7, precision="fp32", bucket_mb=TINY, steps=STEPS_TO_NARROW),
    "k=8, a random deal each step": Case(
        convolutions, 8, precision="fp32", bucket_mb=TINY, steps=STEPS_TO_NARROW, random_deal=True
    ),
    "k=7, an overflow": Case(convolutions, 7, precision="fp32", steps=STEPS_TO_NARROW + 2, spike=STEPS_TO_NARROW - 1),
    "k=8, gradient_as_bucket_view": Case(
        convolutions, 8, precision="fp32", steps=STEPS_TO_NARROW, gradient_as_bucket_view=True
    ),
    "k=6, channels_last": Case(convolutions, 6, precision="fp32", channels_last=True),
    "k=8, bf16, channels_last": Case(convolutions, 8, precision="bf16", channels_last=True),
    "k=12, two workers a pass": Case(convolutions, 12, precision="fp32", workers_per_pass=2),
    "k=8, dropout": Case(dropout, 8, precision="fp32"),
}


class Batch(NamedTuple):
    images: Tensor  # [k, n, C, H, W]
    labels: Tensor  # [k, n]


def batch(case: Case, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(case.k, IMAGES_PER_WORKER, *SHAPE, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (case.k, IMAGES_PER_WORKER), generator=generator)
    return Batch(images if case.precision == "fp64" else images.float(), labels)


def make_model(case: Case) -> nn.Module:
    torch.manual_seed(1)
    model = case.model()
    model = model.double() if case.precision == "fp64" else model
    return model.to(memory_format=torch.channels_last) if case.channels_last else model


class Outcome(NamedTuple):
    gradients: list[list[np.ndarray]]  # [step][parameter]
    losses: list[float]
    sums: list[float]
    digests: list[str]  # one for each step: gradients, BatchNorm's statistics, loss and sums


def train(case: Case, ranks: Ranks) -> Outcome:
    """Three steps of plain SGD; DDP lays its buckets out anew after the first."""
    model = make_model(case)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    virtual = VirtualWorkers(
        model,
        ranks,
        virtual_workers=case.k,
        workers_per_pass=case.workers_per_pass,
        reduction=case.reduction,
        bucket_mb=case.bucket_mb,
        gradient_as_bucket_view=case.gradient_as_bucket_view,
        seed=3,
    )
    autocast = make_autocast("bf16" if case.precision == "bf16" else "fp32", ranks.device)
    outcome = Outcome([], [], [], [])
    for step in range(case.steps):
        images, labels = batch(case, step)
        if case.random_deal:
            virtual.deal = random_deal(case.k, ranks.world_size, step)
        with virtual.step(step) as passes:
            for workers in passes:
                chosen = images[workers.start : workers.stop].flatten(0, 1)
                if case.channels_last:
                    chosen = chosen.contiguous(memory_format=torch.channels_last)
                with autocast():
                    loss = F.cross_entropy(virtual(chosen), labels[workers.start : workers.stop].flatten())
                if step == case.spike:
                    loss = loss * 2.0**20
                virtual.backward(loss, sums={"count": torch.tensor([len(workers), workers.start])})
        outcome.gradients.append([p.grad.numpy().copy() for p in model.parameters() if p.grad is not None])
        outcome.losses.append(virtual.loss.item())
        outcome.sums.extend(virtual.sums["count"].tolist())
        state = [*outcome.gradients[-1], *(b.numpy() for b in model.buffers())]
        state += [virtual.loss.numpy(), virtual.sums["count"].numpy()]
        outcome.digests.append(hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in state)).hexdigest())
        overflowed = bool(virtual.outcome.overflowed.any())
        assert overflowed == (step == case.spike)
        update_unless(torch.tensor(overflowed), optimizer)
    return outcome


def random_deal(passes: int, world_size: int, step: int) -> Deal:
    """Any passes to any rank, in any order."""
    drawn = random.Random(step)
    order = drawn.sample(range(passes), passes)
    cuts = sorted(drawn.sample(range(1, passes), world_size - 1))
    return Deal(tuple(tuple(order[a:b]) for a, b in itertools.pairwise([0, *cuts, passes])))


def train_all(launch: Launch, names: list[str]) -> dict[str, Outcome]:
    with connect(launch, device="cpu") as ranks:
        return {name: train((CASES | BITWISE)[name], ranks) for name in names}


@functools.cache
def outcomes(world_size: int) -> list[dict[str, Outcome]]:
    """Every case that so many ranks can run, in one launch; rank by rank."""
    names = [name for name, case in CASES.items() if world_size in case.ranks]
    names += [name for name, case in BITWISE.items() if world_size <= case.k // case.workers_per_pass]
    return run_ranks(train_all, world_size, names)


def reference(case: Case) -> tuple[list[list[np.ndarray]], list[float]]:
    """Plain PyTorch: the loss over all kn images at once, the model applied to each worker's n by themselves."""
    model = make_model(case)
    gradients, losses = [], []
    for step in range(case.steps):
        images, labels = batch(case, step)
        logits = torch.cat([model(images[worker]) for worker in range(case.k)])
        loss = F.cross_entropy(logits, labels.flatten())
        wanted = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, wanted)
        gradients.append([g.numpy() for g in found])
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, gradient in zip(wanted, found, strict=True):
                parameter -= LR * gradient
    return gradients, losses


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_mean_loss_over_all_images(name: str) -> None:
    case = CASES[name]
    gradients, losses = reference(case)
    for world_size in case.ranks:
        for outcome in (ranks[name] for ranks in outcomes(world_size)):
            for step in range(STEPS):
                assert len(outcome.gradients[step]) == len(gradients[step])
                for ours, expected in zip(outcome.gradients[step], gradients[step], strict=True):
                    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
            assert outcome.losses == pytest.approx(losses, abs=1e-12)
            passes = range(0, case.k, case.workers_per_pass)
            assert outcome.sums == [case.k, sum(passes)] * STEPS


def test_the_tests_gradients_are_not_small() -> None:
    gradients, _ = reference(CASES["exact, BatchNorm"])
    assert max(abs(g).max() for g in gradients[-1]) > 1e-2


@pytest.mark.parametrize("name", BITWISE)
def test_reproducible_is_the_same_to_the_last_bit_on_any_number_of_ranks(name: str) -> None:
    case = BITWISE[name]
    alone = outcomes(1)[0][name].digests
    assert len(set(alone)) == case.steps
    for world_size in range(2, 7):
        assert [ranks[name].digests for ranks in outcomes(world_size)] == [alone] * world_size, world_size
    assert case.k // case.workers_per_pass >= 6


@pytest.mark.parametrize("name", ["k=8", "k=7, buckets", "k=8, a random deal each step"])
def test_int32_sums_too_are_the_gradient_of_the_mean_loss(name: str) -> None:
    """After the int64 steps, on real processes, against plain PyTorch in float32 on the same way of the weights."""
    case = BITWISE[name]
    gradients, losses = reference(case)
    for world_size in (1, 3):
        outcome = outcomes(world_size)[0][name]
        assert outcome.losses == pytest.approx(losses, rel=1e-5)
        for ours, expected in zip(outcome.gradients[-1], gradients[-1], strict=True):
            assert np.linalg.norm(ours - expected) <= 2e-5 * np.linalg.norm(expected) + 1e-7


@pytest.mark.parametrize("name", ["fast", "fast, buckets", "fast, k=5"])
def test_fast_leaves_the_same_gradients_on_every_rank(name: str) -> None:
    for world_size in (2, 3, 4):
        assert len({tuple(ranks[name].digests) for ranks in outcomes(world_size)}) == 1


def test_dropout_draws_anew_in_every_step_and_pass() -> None:
    case = BITWISE["k=8, dropout"]
    with connect(Launch(), device="cpu") as ranks:
        virtual = VirtualWorkers(make_model(case), ranks, virtual_workers=4, seed=3)
        ones = torch.ones(2, 1000)
        masks = []
        for step in range(2):
            with virtual.step(step) as passes:
                for _ in passes:
                    masks.append(tuple((F.dropout(ones, 0.5) > 0).flatten().tolist()))
                    virtual.backward(virtual(torch.ones(2, *SHAPE)).mean())
    assert len(set(masks)) == 8


class Unused(nn.Module):
    """One parameter takes no part in the loss, or only in that of the first forward."""

    def __init__(self, *, from_the_start: bool) -> None:
        super().__init__()
        self.used = nn.Linear(4, 2)
        self.idle = nn.Parameter(torch.zeros(2))
        self.is_idle = from_the_start

    def forward(self, inputs: Tensor) -> Tensor:
        was_idle, self.is_idle = self.is_idle, True
        return self.used(inputs) if was_idle else self.used(inputs) + self.idle


def train_unused(launch: Launch) -> list[str]:
    """What is said of an unused parameter; k = N is one pass for each rank."""
    said = []
    with connect(launch, device="cpu") as ranks:
        for reduction, from_the_start, passes in [
            ("fast", True, 1),
            ("reproducible", True, 1),
            ("fast", True, 4),
            ("reproducible", True, 4),
            ("reproducible", False, 2),
        ]:
            model = Unused(from_the_start=from_the_start)
            virtual = VirtualWorkers(
                model, ranks, virtual_workers=passes * launch.world_size, reduction=reduction, bucket_mb=TINY
            )
            try:
                with virtual.step(0) as passes:
                    for _ in passes:
                        virtual.backward(virtual(torch.ones(2, 4)).mean())
            except UserError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_unused_parameter_is_an_error_and_no_deadlock(world_size: int) -> None:
    for said in run_ranks(train_unused, world_size, timeout=60.0):
        assert all("1 of the model's 3 trainable parameters got no gradient" in line for line in said[:4])
        assert all("freeze the others with requires_grad_(False)" in line for line in said)
        assert len(said) == 5


def test_more_ranks_than_passes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="too few for 3 ranks"):
        VirtualWorkers(layernorm(), Ranks(0, 3, torch.device("cpu"), "gloo"), virtual_workers=2)


def test_a_loss_of_higher_precision_than_the_model() -> None:
    model = make_model(BITWISE["k=8"])
    with connect(Launch(), device="cpu") as ranks:
        virtual = VirtualWorkers(model, ranks, virtual_workers=2)
        with virtual.step(0) as passes:
            for _ in passes:
                virtual.backward(
                    F.cross_entropy(virtual(torch.randn(4, *SHAPE)).double(), torch.zeros(4, dtype=torch.long))
                )
    assert virtual.loss.dtype == torch.float64
    assert all(buffer.dtype != torch.float64 for buffer in model.buffers())
