"""LARS: each layer's update scaled by how large its weights are beside their gradients (You, Gitman, Ginsburg 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from largebatch.models.normalisation import batchnorm_modules
from largebatch.training.momentum import MomentumOptimizer


def lars_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `model` as groups for `LARS`: adapted and decayed; and BatchNorm's and all biases,
    neither adapted nor decayed. Both are told by their modules."""
    spared = {id(p) for _, module in batchnorm_modules(model) for p in module.parameters(recurse=False)}
    spared |= {id(bias) for module in model.modules() if isinstance(bias := getattr(module, "bias", None), Tensor)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in spared], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in trainable if id(p) in spared], "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


class LARS(MomentumOptimizer):
    """Momentum SGD whose learning rate is each layer's own.

    For the weights w of a layer with gradient g: r = trust |w| / (|g| + λ|w|), v = m v + η r (g + λ w), w = w - v.
    The learning rate is inside the buffer v, as in the publication, and the momentum is not Nesterov's. A layer
    whose weights or gradients are all 0 has r = 1, as do groups with `adapt` false.
    """

    def __init__(self, params: list[dict[str, Any]], *, momentum: float, trust_coefficient: float) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0, "adapt": True})
        self._trust = trust_coefficient

    def _update(
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor]
    ) -> None:
        decay = group["weight_decay"]
        updates = list(torch._foreach_add(gradients, weights, alpha=decay))
        if group["adapt"]:
            torch._foreach_mul_(updates, self._ratios(weights, gradients, decay))
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates, alpha=group["lr"])
        torch._foreach_sub_(weights, buffers)

    def _ratios(self, weights: list[Tensor], gradients: list[Tensor], decay: float) -> list[Tensor]:
        """Each layer's r, on its device."""
        large = torch.stack(torch._foreach_norm(weights))
        steep = torch.stack(torch._foreach_norm(gradients))
        ratios = self._trust * large / (steep + decay * large)
        return list(torch.where((large > 0) & (steep > 0), ratios, 1.0).unbind())
