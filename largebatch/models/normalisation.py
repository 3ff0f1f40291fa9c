"""Which modules of a model are BatchNorm, by type and never by name; and those that stay frozen."""

from __future__ import annotations

import types

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batchnorm_modules(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Every BatchNorm of the model with its name, in the order of ``named_modules``."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def keep_in_evaluation(module: nn.Module) -> None:
    """Put `module` into evaluation mode for good: a later `train()` of it, or of the whole model, leaves it there."""
    module.eval()
    module.train = types.MethodType(_stays, module)  # type: ignore[method-assign]


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def keep_frozen(model: nn.Module) -> list[str]:
    """Keep each BatchNorm that the model's constructor left in evaluation mode there; returns their names.

    A model that is in evaluation mode as a whole was only returned so: its parts are not frozen.
    """
    frozen = [(n, m) for n, m in batchnorm_modules(model) if not m.training] if model.training else []
    for _, module in frozen:
        keep_in_evaluation(module)
    return [name for name, _ in frozen]
