"""Contracts 5 and 7: what is decayed, and the two forms of momentum, against the paper's formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from largebatch.training.groups import parameter_groups
from largebatch.training.momentum import LrInsideSGD
from largebatch.training.optimizer import make_optimizer, restore_optimizer, set_lr, update_unless
from largebatch.training.settings import OptimizerSettings

RATES = [0.1, 0.2, 0.4, 0.8, 0.8, 0.08, 0.08, 0.008]  # warmup, peak, two decays
MOMENTUM, DECAY = 0.9, 0.05


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return torchvision.models.resnet50()


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_resnet50_spares_the_106_tensors_of_batchnorm_and_no_other(resnet50: nn.Module) -> None:
    decayed, spared = parameter_groups(resnet50, 1e-4)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1e-4, 0.0)
    names = names_of(resnet50, spared["params"])
    assert len(names) == len(spared["params"]) == 106
    # torchvision names its BatchNorms bn1, bn2, bn3 and downsample.1.
    assert names == {n for n, _ in resnet50.named_parameters() if ".bn" in f".{n}" or "downsample.1." in n}
    assert len([name for name in names if "downsample.1." in name]) == 8
    kept = names_of(resnet50, decayed["params"])
    assert {"fc.bias", "fc.weight", "conv1.weight", "layer1.0.downsample.0.weight"} <= kept
    assert names | kept == {name for name, _ in resnet50.named_parameters()}
    assert not names & kept


def test_the_switch_decays_batchnorm_too(resnet50: nn.Module) -> None:
    assert [group["weight_decay"] for group in parameter_groups(resnet50, 1e-4, decay_batchnorm=True)] == [1e-4] * 2


def test_other_norms_are_decayed_frozen_parameters_left_out_and_empty_groups_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.GroupNorm(1, 2))
    (only,) = parameter_groups(model, 0.1)
    assert len(only["params"]) == 6
    mixed = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
    mixed[0].bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(mixed, 0.1)] == [1, 2]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[1].bias += torch.randn(4, dtype=torch.float64)
    return model


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    """Gradients that depend on the weights, as real ones do."""
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.3 * p.detach().tanh() for p in model.parameters()
    ]


def train(settings: OptimizerSettings) -> list[Tensor]:
    model = small_model()
    optimizer = make_optimizer(model, settings)
    for step, lr in enumerate(RATES):
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        set_lr(optimizer, lr)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def reference(*, nesterov: bool, decay_batchnorm: bool = False, form: int = 9, corrected: bool = True) -> list[Tensor]:
    """Equations (9) and (10) of the paper, tensor by tensor."""
    model = small_model()
    decays = [DECAY, DECAY, *([DECAY if decay_batchnorm else 0.0] * 2), DECAY, DECAY]
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    last = RATES[0]
    for step, lr in enumerate(RATES):
        found = gradients(model, step)
        for i, weight in enumerate(model.parameters()):
            g = found[i] + decays[i] * weight.detach()
            if form == 9:  # u = m u + g; w = w - lr u
                buffers[i] = MOMENTUM * buffers[i] + g
                move = lr * (g + MOMENTUM * buffers[i] if nesterov else buffers[i])
            else:  # v = m (lr / last lr) v + lr g; w = w - v
                buffers[i] = MOMENTUM * (lr / last if corrected else 1) * buffers[i] + lr * g
                move = lr * g + MOMENTUM * buffers[i] if nesterov else buffers[i]
            with torch.no_grad():
                weight -= move
        last = lr
    return [p.detach() for p in model.parameters()]


def settings(**changes: object) -> OptimizerSettings:
    return OptimizerSettings.model_validate({"momentum": MOMENTUM, "weight_decay": DECAY, **changes})


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)


def furthest(ours: list[Tensor], others: list[Tensor]) -> float:
    return max((left - right).abs().max().item() for left, right in zip(ours, others, strict=True))


@pytest.mark.parametrize("nesterov", [True, False])
def test_pytorchs_form_is_equation_9(nesterov: bool) -> None:
    assert_same(train(settings(nesterov=nesterov)), reference(nesterov=nesterov))


@pytest.mark.parametrize("nesterov", [True, False])
def test_lr_inside_with_correction_takes_the_same_way(nesterov: bool) -> None:
    inside = train(settings(nesterov=nesterov, momentum_form="lr_inside"))
    assert_same(inside, reference(nesterov=nesterov, form=10))
    assert_same(inside, reference(nesterov=nesterov, form=9))


@pytest.mark.parametrize("nesterov", [True, False])
def test_lr_inside_without_correction_is_the_pitfall_of_remark_2(nesterov: bool) -> None:
    wrong = train(settings(nesterov=nesterov, momentum_form="lr_inside_uncorrected"))
    assert_same(wrong, reference(nesterov=nesterov, form=10, corrected=False))
    assert furthest(wrong, reference(nesterov=nesterov)) > 0.1


@pytest.mark.parametrize("form", ["lr_outside", "lr_inside"])
def test_decaying_batchnorm_moves_gamma_and_beta_only(form: str) -> None:
    assert_same(
        train(settings(momentum_form=form, decay_batchnorm=True)), reference(nesterov=True, decay_batchnorm=True)
    )
    assert furthest(reference(nesterov=True, decay_batchnorm=True)[2:4], reference(nesterov=True)[2:4]) > 1e-3


def test_no_momentum_is_plain_sgd_in_every_form() -> None:
    ways = [train(settings(momentum=0.0, momentum_form=form)) for form in ("lr_outside", "lr_inside")]
    assert_same(ways[0], ways[1])


@pytest.mark.parametrize("form", ["lr_outside", "lr_inside"])
def test_a_first_step_that_overflows_leaves_no_trace(form: str) -> None:
    """fp16: the scaler skips it, and the second step is what the first would have been."""
    skipped, plain = small_model().float(), small_model().float()
    chosen = settings(momentum_form=form)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, backoff_factor=0.5)
    with_scaler, without = make_optimizer(skipped, chosen, fused=True), make_optimizer(plain, chosen)
    for optimizer in (with_scaler, without):
        set_lr(optimizer, 0.1)
    for factor in (float("inf"), scaler.get_scale() / 2):
        scaler.scale(torch.zeros(()))  # what train_step does to the loss
        for parameter, gradient in zip(skipped.parameters(), gradients(skipped, 0), strict=True):
            parameter.grad = gradient * factor
        scaler.step(with_scaler)
        scaler.update()
        if factor == float("inf"):
            assert all(torch.equal(a, b) for a, b in zip(skipped.parameters(), plain.parameters(), strict=True))
    for parameter, gradient in zip(plain.parameters(), gradients(plain, 0), strict=True):
        parameter.grad = gradient
    without.step()
    for left, right in zip(skipped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_the_inside_form_goes_on_from_its_state() -> None:
    """The buffer is corrected for the rate that it was written with, in an earlier process too."""
    model, resumed = small_model(), small_model()
    first = LrInsideSGD(parameter_groups(model, DECAY))
    for step, lr in enumerate(RATES):
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        set_lr(first, lr)
        first.step()
        if step == 2:
            resumed.load_state_dict(model.state_dict())
            second = LrInsideSGD(parameter_groups(resumed, DECAY))
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        elif step > 2:
            for parameter, gradient in zip(resumed.parameters(), gradients(resumed, step), strict=True):
                parameter.grad = gradient
            set_lr(second, lr)
            second.step()
    for left, right in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)], ids=["to_fused", "from_fused"])
def test_a_run_goes_on_on_another_kind_of_device(before: bool, after: bool) -> None:
    """GPUs use the fused update, CPUs do not; a checkpoint comes from either."""
    settings = OptimizerSettings()
    model = small_model()
    optimizer = make_optimizer(model, settings, fused=before)
    images = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def update(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        set_lr(optimizer, 0.1)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        for left_out in (True, False):
            update_unless(torch.tensor(left_out), optimizer)

    update(optimizer, model)
    other = copy.deepcopy(model)
    gone_on = make_optimizer(other, settings, fused=after)
    restore_optimizer(gone_on, copy.deepcopy(optimizer.state_dict()))
    assert [bool(group["fused"]) for group in gone_on.param_groups] == [after] * 2
    for _ in range(2):
        update(optimizer, model)
        update(gone_on, other)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_checkpoint_without_momentum_starts_the_fused_update_at_zero() -> None:
    model = small_model()
    state = make_optimizer(model, OptimizerSettings()).state_dict()  # no update was applied before it
    fused = make_optimizer(model, OptimizerSettings(), fused=True)
    restore_optimizer(fused, state)
    assert all(fused.state[p]["momentum_buffer"].count_nonzero() == 0 for p in model.parameters())
