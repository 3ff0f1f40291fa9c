"""Which parameters are decayed, which are scaled by layer, and at what share of the learning rate each is trained."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from largebatch.models.depth import layer_numbers
from largebatch.models.normalisation import batchnorm_modules
from largebatch.models.patterns import match
from largebatch.training.settings import OptimizerSettings

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
Groups = list[dict[str, Any]]
"""For an optimizer: ``params``, ``weight_decay``, and what else differs from one group to another."""


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_batchnorm: bool = False) -> Groups:
    """The trainable parameters of `model` as two groups for an optimizer: decayed, and BatchNorm's γ and β.

    BatchNorm is recognised by module type: names miss ``downsample.1``, and the number of dimensions spares
    ``fc.bias``, which the paper decays.
    """
    spared = {"weight_decay": weight_decay if decay_batchnorm else 0.0}
    return _split(model, _of_batchnorm(model), {"weight_decay": weight_decay}, spared)


def groups_of(model: nn.Module, settings: OptimizerSettings) -> Groups:
    """The trainable parameters of `model` as `settings` group them; with `layer_decay`, groups have an ``lr_scale``.

    Raises ConfigError for a pattern in `no_decay` that matches nothing.
    """
    listed = {name for pattern in settings.no_decay for name in match(model, pattern, "optimizer.no_decay")[1]}
    spared = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in listed}
    adapt: list[dict[str, Any]] = [{}, {}]
    if settings.kind != "sgd":
        spared |= _of_one_dimension(model)
        adapt = [{"adapt": True}, {"adapt": False}]
    elif not settings.decay_batchnorm:
        spared |= _of_batchnorm(model)
    groups = _split(
        model, spared, {"weight_decay": settings.weight_decay, **adapt[0]}, {"weight_decay": 0.0, **adapt[1]}
    )
    return groups if settings.layer_decay == 1 else _scaled_by_layer(model, groups, settings.layer_decay)


def _split(model: nn.Module, spared: set[int], of_most: dict[str, Any], of_spared: dict[str, Any]) -> Groups:
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: Groups = [
        {"params": [p for p in trainable if id(p) not in spared], **of_most},
        {"params": [p for p in trainable if id(p) in spared], **of_spared},
    ]
    return [group for group in groups if group["params"]]


def _of_batchnorm(model: nn.Module) -> set[int]:
    return {id(p) for _, module in batchnorm_modules(model) for p in module.parameters(recurse=False)}


def _of_one_dimension(model: nn.Module) -> set[int]:
    """Normalisation layers and biases by module type, what else has one dimension, and what a model of timm names."""
    found = {id(p) for p in model.parameters() if p.ndim <= 1}
    for module in model.modules():
        if isinstance(module, _NORMS):
            found |= {id(p) for p in module.parameters(recurse=False)}
        elif isinstance(bias := getattr(module, "bias", None), Tensor):
            found.add(id(bias))
    names = getattr(model, "no_weight_decay", ())
    names = [*(names() if callable(names) else names)]
    return found | {id(p) for name, p in model.named_parameters() if any(fnmatchcase(name, n) for n in names)}


def _scaled_by_layer(model: nn.Module, groups: Groups, decay: float) -> Groups:
    """Each group as one for each layer, the rate of the layer next to the head times `decay`, and so on."""
    numbers = layer_numbers(model)
    names = {id(p): name for name, p in model.named_parameters()}
    last = max(numbers.values())
    scaled: dict[tuple[int, int], dict[str, Any]] = {}
    for i, group in enumerate(groups):
        for p in group["params"]:
            number = numbers[names[id(p)]]
            new = {**group, "params": [], "lr_scale": decay ** (last - number)}
            scaled.setdefault((i, number), new)["params"].append(p)
    return list(scaled.values())
