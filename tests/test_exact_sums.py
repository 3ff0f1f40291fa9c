"""Exact sums by themselves, against fractions; and the rules of a step of one's own loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from largebatch.distributed.environment import Launch, connect
from largebatch.distributed.exact import WIDE_STEPS, ExactSum
from largebatch.distributed.small_sums import decode, encode
from largebatch.errors import UserError
from largebatch.training.virtual_workers import VirtualWorkers

LEAVES = 8


def leaves_of(parameters: list[nn.Parameter], step: int, scale: float = 1e-3) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [[scale * torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(LEAVES)]


def summed(exact: ExactSum, parameters: list[nn.Parameter], leaves: list[list[Tensor]]) -> list[Tensor]:
    exact.begin_step()
    for leaf in leaves:
        for parameter, gradient in zip(parameters, leaf, strict=True):
            parameter.grad = gradient.clone()
        exact.take()
    exact.finish_alone()
    return [p.grad for p in parameters if p.grad is not None]


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5, 2, 2), (7,), ())]


def test_the_sum_is_the_float64_sum_within_a_few_units_in_any_order(parameters: list[nn.Parameter]) -> None:
    one, other = ExactSum(parameters, LEAVES), ExactSum(parameters, LEAVES)
    for step in range(WIDE_STEPS + 4):
        leaves = leaves_of(parameters, step)
        found = [g.clone() for g in summed(one, parameters, leaves)]
        shuffled = random.Random(step).sample(leaves, LEAVES)
        assert all(torch.equal(a, b) for a, b in zip(found, summed(other, parameters, shuffled), strict=True))
        for i, gradient in enumerate(found):
            expected = torch.stack([leaf[i].double() for leaf in leaves]).sum(0)
            assert (gradient.double() - expected).norm() <= 1e-6 * expected.norm()
        assert not one.end_step().overflowed.any()
        other.end_step()


def test_an_overflow_is_found_and_the_next_step_has_room(parameters: list[nn.Parameter]) -> None:
    exact = ExactSum(parameters, LEAVES)
    for step in range(WIDE_STEPS + 1):
        summed(exact, parameters, leaves_of(parameters, step))
        exact.end_step()
    large = leaves_of(parameters, 99)
    for leaf in large:
        leaf[1] *= 1e3
    seen = []
    for _ in range(3):
        summed(exact, parameters, large)
        seen.append(exact.end_step().overflowed.tolist())
    assert seen == [[False, True, False], [False] * 3, [False] * 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_found_and_changes_no_unit(
    parameters: list[nn.Parameter], value: float
) -> None:
    exact = ExactSum(parameters, LEAVES)
    for step in range(WIDE_STEPS + 1):
        summed(exact, parameters, leaves_of(parameters, step))
        assert not exact.end_step().not_finite
    before = exact.state_dict()["bound"][0].item()
    bad = leaves_of(parameters, 50)
    bad[3][0][1, 2, 0, 0] = value
    summed(exact, parameters, bad)
    outcome = exact.end_step()
    assert outcome.not_finite
    assert not outcome.overflowed.any()
    assert exact.state_dict()["bound"][0].item() == before


def test_units_come_back_from_a_checkpoint(parameters: list[nn.Parameter]) -> None:
    one = ExactSum(parameters, LEAVES)
    for step in range(WIDE_STEPS + 2):
        summed(one, parameters, leaves_of(parameters, step))
        one.end_step()
    other = ExactSum(parameters, LEAVES)
    other.load_state_dict(one.state_dict())
    leaves = leaves_of(parameters, 70)
    first = [g.clone() for g in summed(one, parameters, leaves)]
    assert all(torch.equal(a, b) for a, b in zip(first, summed(other, parameters, leaves), strict=True))
    with pytest.raises(ValueError, match="3 trainable tensors, not 1"):
        ExactSum(parameters[:1], LEAVES).load_state_dict(one.state_dict())


def test_small_sums_are_exact_for_float32_of_any_sensible_size() -> None:
    generator = np.random.default_rng(0)
    numbers = generator.standard_normal((40, 60)) * 2.0 ** generator.integers(-8, 30, (40, 60))
    values = torch.from_numpy(numbers.astype(np.float32))
    total = torch.stack([encode(row) for row in values]).sum(0)
    found, finite = decode(total)
    assert finite
    for column, ours in zip(values.T.tolist(), found.tolist(), strict=True):
        assert ours == pytest.approx(float(sum(map(Fraction, column), Fraction(0))), rel=1e-15, abs=1e-12)


def test_small_sums_count_what_is_not_finite_and_keep_the_rest() -> None:
    found, finite = decode(encode(torch.tensor([1.5, float("nan"), -2.25])) + encode(torch.tensor([1.0, 1.0, 1.0])))
    assert not finite
    assert found.tolist() == [2.5, 1.0, -1.25]


# ---- the step of one's own loop


@pytest.fixture
def virtual() -> Iterator[VirtualWorkers]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with connect(Launch(), device="cpu") as ranks:
        yield VirtualWorkers(model, ranks, virtual_workers=4)


def loss_of(virtual: VirtualWorkers) -> Tensor:
    return virtual(torch.randn(5, 4)).square().mean()


def take_a_step(virtual: VirtualWorkers) -> None:
    with virtual.step(0) as passes:
        for _ in passes:
            virtual.backward(loss_of(virtual))


def leave_early(virtual: VirtualWorkers, passes: Iterator[range]) -> None:
    for _ in passes:
        virtual.backward(loss_of(virtual))
        break


def go_back_twice(virtual: VirtualWorkers, passes: Iterator[range]) -> None:
    for _ in passes:
        virtual.backward(loss_of(virtual))
        virtual.backward(loss_of(virtual))


def leave_one_out(virtual: VirtualWorkers, passes: Iterator[range]) -> None:
    for workers in passes:
        if workers.start != 2:
            virtual.backward(loss_of(virtual))


def leave_the_last_out(virtual: VirtualWorkers, passes: Iterator[range]) -> None:
    for workers in passes:
        if workers.start != 3:
            virtual.backward(loss_of(virtual))


def go_back_by_themselves(virtual: VirtualWorkers, passes: Iterator[range]) -> None:
    for _ in passes:
        loss_of(virtual).backward()


def use_the_model_itself(virtual: VirtualWorkers, passes: Iterator[range]) -> None:
    for _ in passes:
        virtual.backward(virtual.model(torch.randn(5, 4)).square().mean())


def freeze_late(virtual: VirtualWorkers, passes: Iterator[range]) -> None:
    virtual.model[0].requires_grad_(False)
    try:
        for _ in passes:
            virtual.backward(loss_of(virtual))
    finally:
        virtual.model[0].requires_grad_(True)
        virtual.model[0].bias.requires_grad_(True)


def fail(virtual: VirtualWorkers, passes: Iterator[range]) -> None:
    for _ in passes:
        virtual.backward(loss_of(virtual))
        raise KeyError("own")


@pytest.mark.parametrize(
    ("slip", "error", "said"),
    [
        (leave_early, UserError, "left before its last pass"),
        (go_back_twice, UserError, "twice in one pass; add the losses up"),
        (leave_one_out, UserError, r"a pass had no backward; call virtual\.backward\(loss\)"),
        (leave_the_last_out, UserError, "a pass had no backward"),
        (go_back_by_themselves, UserError, r"not loss\.backward\(\)"),
        (use_the_model_itself, UserError, r"call virtual\(images\), not the model itself"),
        (freeze_late, UserError, r"2 of the model's 6 .* were frozen after VirtualWorkers was made"),
        (fail, KeyError, "own"),
    ],
)
def test_a_step_is_whole_or_leaves_nothing_behind(
    virtual: VirtualWorkers, slip: Callable[[VirtualWorkers, Iterator[range]], None], error: type, said: str
) -> None:
    model = virtual.model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(error, match=said), virtual.step(0) as passes:
        slip(virtual, passes)
    assert model[1].momentum == 0.1
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    take_a_step(virtual)  # as if nothing had been
    assert model[1].num_batches_tracked == 1
    with pytest.raises(UserError, match="there is no pass"):
        virtual.backward(loss_of(virtual))


def test_a_step_gives_the_generators_back(virtual: VirtualWorkers) -> None:
    draws = []
    for runs in (False, True):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        if runs:
            with virtual.step(3) as passes:
                for _ in passes:
                    virtual.backward(loss_of(virtual))
        draws.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]


class Moving(nn.Module):
    """Keeps an average of its own, in a buffer."""

    def __init__(self, *, replaces: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("average", torch.zeros(2))
        self.replaces = replaces

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.layer(inputs)
        if self.replaces:
            self.average = self.average + out.detach().mean(0)
        else:
            self.average.lerp_(out.detach().mean(0), 0.1)
        return out


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Moving(replaces=False), "average"),
        (Moving(replaces=True), "average"),
        (nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True)), "running_mean"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2)), "parametrizations.weight.0._u"),
    ],
    ids=["in place", "replaced", "InstanceNorm", "spectral_norm"],
)
def test_a_buffer_that_forward_changes_is_refused_by_name(model: nn.Module, name: str) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if not list(model.parameters()):
        model = nn.Sequential(nn.Linear(4, 4), model)
    with connect(Launch(), device="cpu") as ranks:
        virtual = VirtualWorkers(model, ranks, virtual_workers=2)
    with pytest.raises(UserError, match=f"changes the buffer .*{name}"):
        take_a_step(virtual)
