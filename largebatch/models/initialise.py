"""The paper's initialisation (§5.1), by module type."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torchvision.models.resnet import BasicBlock, Bottleneck

from largebatch.models.mlp import MLP
from largebatch.models.small_resnet import SmallBlock


def initialise(model: nn.Module, last_gamma: float) -> list[str]:
    """Redraw the weights from torch's CPU generator, in place; returns the names of the layers left unchanged.

    Those are layers that are frozen, or whose weight is computed from others (weight_norm and parametrizations).

    Convolutions: He normal, of variance 2 / fan-out (the mode of the ResNet code that the paper follows, and
    of torchvision). Fully connected: N(0, 0.01²). Biases 0. BatchNorm: γ = 1, β = 0, but γ = ``last_gamma``
    in the last BatchNorm of every residual block (torchvision's two kinds and ours). Other modules stay.
    """
    left = []
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear | _BatchNorm) and not _may_be_drawn(module):
            left.append(name)
        elif isinstance(module, _ConvNd):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            _zero(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.01)
            _zero(module.bias)
        elif isinstance(module, _BatchNorm) and module.affine:
            init.ones_(module.weight)
            _zero(module.bias)
    for module in model.modules():
        last = _last_batchnorm(module)
        if last is not None and _may_be_drawn(last):
            init.constant_(last.weight, last_gamma)
        elif isinstance(module, MLP):
            # The paper's 0.01 is for a ResNet's one classifier; through four layers the signal would die out.
            for layer in module.hidden:
                init.kaiming_normal_(layer.get_parameter("weight"), nonlinearity="relu")
    return left


def _may_be_drawn(module: _ConvNd | nn.Linear | _BatchNorm) -> bool:
    own = module._parameters
    if isinstance(module, _BatchNorm) and not module.affine:
        return True  # nothing to draw
    return own.get("weight") is not None and all(p is None or p.requires_grad for p in own.values())


def _last_batchnorm(module: nn.Module) -> _BatchNorm | None:
    """The BatchNorm at the end of a residual block's branch; None where ``module`` is no such block."""
    last = None
    if isinstance(module, BasicBlock | SmallBlock):
        last = module.bn2
    elif isinstance(module, Bottleneck):
        last = module.bn3
    return last if isinstance(last, _BatchNorm) and last.affine else None


def _zero(parameter: Tensor | None) -> None:
    if parameter is not None:
        init.zeros_(parameter)
