"""AdamW, LAMB, clipping, and what is decayed, scaled and slowed by layer, against torch, timm and the formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from largebatch.config import Config
from largebatch.distributed.environment import Launch, connect
from largebatch.distributed.exact import WIDE_STEPS
from largebatch.errors import ConfigError
from largebatch.models.depth import layer_numbers
from largebatch.training.groups import groups_of
from largebatch.training.optimizer import make_optimizer, restore_optimizer, set_lr, update_unless
from largebatch.training.settings import OptimizerSettings
from largebatch.training.virtual_workers import VirtualWorkers

RATES = [0.01, 0.04, 0.02]
DECAY, EPSILON, BETAS = 0.05, 1e-6, [0.8, 0.95]
ADAPTIVE = {"weight_decay": DECAY, "epsilon": EPSILON, "betas": BETAS}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.3 * p.detach()


def update(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        set_lr(optimizer, RATES[step])
        update_unless(torch.tensor(False), optimizer)


def assert_close(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def settings(**keys: Any) -> OptimizerSettings:
    return OptimizerSettings.model_validate(keys)


def test_adamw_is_torchs_with_matrices_decayed() -> None:
    ours, theirs = small_model(), small_model()
    update(ours, make_optimizer(ours, settings(kind="adamw", **ADAPTIVE)), range(3))
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [{"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    groups = [{"params": matrices}, *vectors]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=EPSILON, weight_decay=DECAY)
    for step, lr in enumerate(RATES):
        set_gradients(theirs, step)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    assert_close(ours, theirs)


def test_lamb_is_algorithm_2_of_its_paper() -> None:
    ours, theirs = small_model(), small_model()
    update(ours, make_optimizer(ours, settings(kind="lamb", **ADAPTIVE)), range(3))
    m, v = ([torch.zeros_like(p) for p in theirs.parameters()] for _ in range(2))
    for t, lr in enumerate(RATES, start=1):
        set_gradients(theirs, t - 1)
        for i, p in enumerate(theirs.parameters()):
            assert p.grad is not None
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * p.grad
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * p.grad**2
            r = m[i] / (1 - BETAS[0] ** t) / ((v[i] / (1 - BETAS[1] ** t)).sqrt() + EPSILON)
            move = r if p.ndim < 2 else (r + DECAY * p) * p.norm() / (r + DECAY * p).norm()
            p.data -= lr * move.detach()
    assert_close(ours, theirs)


@pytest.mark.parametrize(("weight", "gradient", "expected"), [(0.0, 1.0, -0.1), (1.0, 0.0, 1.0)])
def test_lamb_does_not_divide_by_zero(weight: float, gradient: float, expected: float) -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.constant_(model.weight, weight)
    model.weight.grad = torch.full((2, 2), gradient)
    optimizer = make_optimizer(model, settings(kind="lamb", weight_decay=0.0))
    set_lr(optimizer, 0.1)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 2), expected))


@pytest.mark.parametrize(("before", "after"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_resumed_fused_or_not_and_a_step_left_out_leaves_no_trace(kind: str, before: bool, after: bool) -> None:
    """GPUs use the fused update of AdamW, CPUs do not; a checkpoint comes from either."""
    chosen = settings(kind=kind, layer_decay=0.5, **ADAPTIVE)
    whole = small_model()
    first = make_optimizer(whole, chosen, fused=before)
    set_gradients(whole, 0)
    update_unless(torch.tensor(True), first)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), small_model().parameters(), strict=True))
    update(whole, first, range(2))
    resumed = copy.deepcopy(whole)
    second = make_optimizer(resumed, chosen, fused=after)
    restore_optimizer(second, copy.deepcopy(first.state_dict()))
    update(whole, first, range(2, 3))
    update(resumed, second, range(2, 3))
    assert_close(resumed, whole)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_is_torchs(scale: float) -> None:
    for clip, torchs in [("clip_norm", nn.utils.clip_grad_norm_), ("clip_value", nn.utils.clip_grad_value_)]:
        ours, theirs = small_model(), small_model()
        optimizer = make_optimizer(ours, settings(**{clip: 0.5}))
        reference = make_optimizer(theirs, settings())
        for model in (ours, theirs):
            set_gradients(model, 0)
            for p in model.parameters():
                p.grad *= scale
        torchs(theirs.parameters(), 0.5)
        for one in (optimizer, reference):
            set_lr(one, 0.1)
            one.step()
        assert_close(ours, theirs)


def test_norm_is_exact_whatever_the_layout_of_the_gradients() -> None:
    """DDP lays gradients out in its buckets; one rank has them by themselves."""
    torch.manual_seed(0)
    values = [torch.randn(16, 3, 3, 3), torch.randn(7)]

    def clipped(spread: bool) -> list[Tensor]:
        model = nn.ParameterList(torch.zeros_like(v) for v in values)
        bucket = torch.zeros(500)
        offset = 1
        for p, v in zip(model, values, strict=True):
            p.grad = bucket[offset : offset + v.numel()].view_as(v).copy_(v) if spread else v.clone()
            offset += v.numel()
        optimizer = make_optimizer(model, settings(clip_norm=0.1, momentum=0.0))
        set_lr(optimizer, 1.0)
        optimizer.step()
        return [p.detach() for p in model]

    alone, spread = clipped(False), clipped(True)
    assert all(torch.equal(a, b) for a, b in zip(alone, spread, strict=True))
    assert sum(a.double().square().sum() for a in alone).sqrt().item() == pytest.approx(0.1, rel=1e-5)


def test_exact_sums_keep_the_small_elements_that_adam_divides_by_their_own_size() -> None:
    """The grid of a tensor is a share of its largest element."""
    workers, images = 16, 8
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=10)
    torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    optimizer = make_optimizer(model, settings(kind="adamw"))
    set_lr(optimizer, 0.001)
    labels = torch.arange(images) % 10
    with connect(Launch(), device="cpu") as ranks:
        virtual = VirtualWorkers(model, ranks, virtual_workers=workers)
        for step in range(WIDE_STEPS + 4):
            minibatch = torch.randn(workers, images, 3, 16, 16) + labels[:, None, None, None] / 5
            with virtual.step(step) as passes:
                for (worker,) in passes:
                    virtual.backward(F.cross_entropy(virtual(minibatch[worker]), labels))
            summed = [p.grad.double() for p in model.parameters() if p.grad is not None]
            if step < WIDE_STEPS + 3:
                optimizer.step()
    model.zero_grad()
    expected = [torch.zeros_like(g) for g in summed]
    for part in minibatch:
        leaf = torch.autograd.grad(F.cross_entropy(model(part), labels) / workers, list(model.parameters()))
        expected = [e + g.double() for e, g in zip(expected, leaf, strict=True)]
    matrices = [(s, e) for s, e in zip(summed, expected, strict=True) if s.ndim > 1]  # keys' biases have none
    errors = torch.cat([((s - e).abs() / e.abs()).flatten() for s, e in matrices])
    assert errors.nanmedian() < 1e-5
    assert (errors > 0.01).double().mean() < 1e-3


def names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def by_name(model: nn.Module, groups: Any, key: str) -> dict[str, float]:
    return {name: group[key] for group in groups for name in names(model, group["params"])}


def test_adamw_decays_and_slows_what_timm_does() -> None:
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    for name in ("test_vit", "test_convnext", "test_resnet"):
        model = timm.create_model(name)
        own = getattr(model, "no_weight_decay", set)()
        ours = groups_of(model, settings(kind="adamw", weight_decay=0.1, layer_decay=0.75))
        theirs = param_groups_layer_decay(model, 0.1, no_weight_decay_list=own, layer_decay=0.75)
        for key in ("weight_decay", "lr_scale"):
            assert by_name(model, ours, key) == pytest.approx(by_name(model, theirs, key))


def test_layers_told_by_the_structure_are_those_that_timm_names(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    for name in ("test_vit", "test_resnet"):
        model = timm.create_model(name)
        expected = layer_numbers(model)
        monkeypatch.setattr(type(model), "group_matcher", None)
        assert layer_numbers(model) == expected


def test_layers_of_torchvisions_models_and_of_a_chain() -> None:
    vit = layer_numbers(torchvision.models.VisionTransformer(16, 8, 3, 2, 16, 16))
    assert {vit[name] for name in ("class_token", "conv_proj.weight", "encoder.pos_embedding")} == {0}
    assert vit["encoder.layers.encoder_layer_2.mlp.0.weight"] == vit["encoder.ln.weight"] == 3
    assert vit["heads.head.weight"] == vit["heads.head.bias"] == 4
    chain = layer_numbers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2)))
    assert list(chain.values()) == [1, 1, 2, 2, 3, 3]


def test_patterns_spare_more_and_one_without_a_match_is_refused() -> None:
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 16)
    tokens = {"class_token", "encoder.pos_embedding"}
    for kind in ("sgd", "adamw", "lamb", "lars"):
        decayed, spared = groups_of(vit, settings(kind=kind, no_decay=["class_token", "*pos_embedding"]))
        assert tokens <= names(vit, spared["params"])
        assert not tokens & names(vit, decayed["params"])
    with pytest.raises(
        ConfigError, match=r"optimizer\.no_decay: 'class_tokens' matches no .*did you mean 'class_token'"
    ):
        groups_of(vit, settings(no_decay=["class_tokens"]))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kind": "adamw", "momentum": 0.5}, "momentum: 0.5 is for kind sgd or lars; adamw does not take it"),
        ({"betas": [0.9, 0.99]}, "betas: .* is for kind adamw or lamb; sgd does not take it"),
        ({"kind": "lamb", "betas": [0.9, 1.0]}, "less than 1"),
        ({"kind": "lamb", "betas": [0.9]}, "at least 2"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "give one of them"),
        ({"clip_norm": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be_meant(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**keys)


@pytest.mark.parametrize(("kind", "rule"), [("sgd", "linear"), ("lars", "linear"), ("adamw", "sqrt"), ("lamb", "sqrt")])
def test_the_rule_follows_the_optimizer_unless_it_is_given(kind: str, rule: str) -> None:
    optimizer = {"kind": kind}
    assert Config.model_validate({"optimizer": optimizer}).schedule.lr_rule == rule
    for given in ("linear", "sqrt", "none"):
        config = Config.model_validate({"optimizer": optimizer, "schedule": {"lr_rule": given}})
        assert config.schedule.lr_rule == given
        assert Config.model_validate(config.model_dump()) == config
