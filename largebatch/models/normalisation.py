"""Which modules of a model are BatchNorm: by type, never by name."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batchnorm_modules(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Every BatchNorm of the model with its name, in the order of ``named_modules``."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
