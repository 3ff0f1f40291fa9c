"""Switches for experiments beyond the paper's recipe: LARS, and BatchNorm over all images of a pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from largebatch.config import Config
from largebatch.distributed.environment import Launch, connect
from largebatch.training.groups import groups_of
from largebatch.training.layerwise import LARS
from largebatch.training.optimizer import make_optimizer, set_lr
from largebatch.training.settings import OptimizerSettings
from largebatch.training.virtual_workers import VirtualWorkers

TRUST, MOMENTUM, DECAY = 0.02, 0.9, 0.05


def test_lars_spares_batchnorm_and_every_bias() -> None:
    model = torchvision.models.resnet50()
    adapted, spared = groups_of(model, OptimizerSettings(kind="lars"))
    assert (adapted["weight_decay"], adapted["adapt"]) == (1e-4, True)
    assert (spared["weight_decay"], spared["adapt"]) == (0.0, False)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(spared["params"]) == 106 + 1
    assert [names[id(p)] for p in spared["params"]][-1] == "fc.bias"
    # What is left: the 53 convolutions and the fully connected layer.
    assert len(adapted["params"]) == 54
    assert all(p.dim() > 1 for p in adapted["params"])


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def test_lars_follows_its_formula() -> None:
    model = small_model()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    settings = OptimizerSettings(kind="lars", momentum=MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST)
    optimizer = make_optimizer(model, settings)
    for step, lr in enumerate([0.5, 2.0, 0.2]):
        generator = torch.Generator().manual_seed(step)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            w, g = expected[name], p.grad
            if name in ("0.weight", "2.weight"):
                ratio = TRUST * w.norm() / (g.norm() + DECAY * w.norm())
                velocity[name] = MOMENTUM * velocity[name] + lr * ratio * (g + DECAY * w)
            else:
                velocity[name] = MOMENTUM * velocity[name] + lr * g
            expected[name] = w - velocity[name]
        set_lr(optimizer, lr)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0)])
def test_lars_does_not_divide_by_zero(weight: float, gradient: float) -> None:
    p = nn.Parameter(torch.full((2, 2), weight))
    p.grad = torch.full((2, 2), gradient)
    optimizer = LARS([{"params": [p]}], momentum=0.0, trust_coefficient=TRUST)
    set_lr(optimizer, 0.1)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), weight - 0.1 * gradient))


def test_lars_goes_on_from_a_checkpoint() -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            set_lr(optimizer, 0.3)
            optimizer.step()

    settings = OptimizerSettings(kind="lars")
    whole = small_model()
    first = make_optimizer(whole, settings)
    steps(whole, first, range(2))
    resumed = copy.deepcopy(whole)
    second = make_optimizer(resumed, settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(whole, first, range(2, 4))
    steps(resumed, second, range(2, 4))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lars_with_another_form_of_momentum_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"momentum_form: .* is for kind sgd; lars does not take it"):
        Config.model_validate({"optimizer": {"kind": "lars", "momentum_form": "lr_inside"}})


def one_step(over: str, images: Tensor, labels: Tensor) -> nn.Module:
    """A model with its gradients and running statistics after one step of 4 workers, 2 in a pass."""
    model = small_model()
    with connect(Launch(), device="cpu") as ranks:
        virtual = VirtualWorkers(
            model, ranks, virtual_workers=4, workers_per_pass=2, batchnorm_momentum=0.9, batchnorm_over=over
        )
        with virtual.step(0) as passes:
            for workers in passes:
                chosen = slice(workers.start * 3, workers.stop * 3)
                virtual.backward(F.cross_entropy(virtual(images[chosen]), labels[chosen]))
    return model


@pytest.mark.parametrize(("over", "group"), [("worker", 3), ("pass", 6)])
def test_batchnorm_normalises_what_the_switch_says(over: str, group: int) -> None:
    images = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 2
    ours = one_step(over, images, labels)
    reference = small_model()
    logits = torch.cat([reference(part) for part in images.split(group)])
    F.cross_entropy(logits, labels).backward()
    for ours_p, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert ours_p.grad is not None
        torch.testing.assert_close(ours_p.grad, theirs.grad)
    hidden = reference[0](images).detach()
    mean = torch.stack([part.mean(0) for part in hidden.split(group)]).mean(0)
    torch.testing.assert_close(ours[1].running_mean, 0.1 * mean)
