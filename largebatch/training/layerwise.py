"""Optimizers that scale each layer's update by the size of its weights relative to it: LARS and LAMB."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from largebatch.training.momentum import BufferedOptimizer


class LARS(BufferedOptimizer):
    """Momentum SGD whose learning rate is each layer's own (You, Gitman, Ginsburg 2017).

    For the weights w of a layer with gradient g: r = trust |w| / (|g| + λ|w|), v = m v + η r (g + λ w), w = w - v.
    The learning rate is inside the buffer v, as in the publication, and the momentum is not Nesterov's. A layer
    whose weights or gradients are all 0 has r = 1, as do groups with `adapt` false.
    """

    buffers = ("momentum_buffer",)

    def __init__(self, params: list[dict[str, Any]], *, momentum: float, trust_coefficient: float) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0, "adapt": True})
        self._trust = trust_coefficient

    def _update(
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], buffers: list[list[Tensor]]
    ) -> None:
        decay, (velocities,) = group["weight_decay"], buffers
        updates = list(torch._foreach_add(gradients, weights, alpha=decay))
        if group["adapt"]:
            # In memory of their own: on GPUs, the order in which a norm adds depends on where a gradient lies.
            copies = list(torch._foreach_mul(gradients, 1.0))
            torch._foreach_mul_(updates, _ratios(weights, copies, decay, self._trust))
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates, alpha=group["lr"])
        torch._foreach_sub_(weights, velocities)


class LAMB(BufferedOptimizer):
    """Adam's update, with decoupled weight decay, scaled to each layer's weights (You et al. 2020, Algorithm 2).

    For the weights w of a layer with gradient g: m and v are the running averages of g and g², corrected for their
    start at 0 in m̂ and v̂; u = m̂ / (√v̂ + ε) + λ w, w = w - η |w| / |u| u. φ is the identity. A layer whose weights or
    update are all 0 is not scaled, nor are groups with `adapt` false.
    """

    buffers = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: list[dict[str, Any]], *, betas: tuple[float, float], epsilon: float) -> None:
        defaults = {"lr": 0.0, "betas": betas, "eps": epsilon, "weight_decay": 0.0, "adapt": True, "step": 0}
        super().__init__(params, defaults)

    def _update(
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], buffers: list[list[Tensor]]
    ) -> None:
        (first, second), (averages, squares) = group["betas"], buffers
        group["step"] += 1
        torch._foreach_lerp_(averages, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(1 - second ** group["step"]))
        torch._foreach_add_(roots, group["eps"])
        updates = list(torch._foreach_div(averages, roots))
        torch._foreach_div_(updates, 1 - first ** group["step"])
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(updates, _ratios(weights, updates))
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def _ratios(
    weights: list[Tensor], others: list[Tensor], decay: float = 0.0, trust: float = 1.0
) -> list[Tensor] | tuple[Tensor, ...]:
    """trust |w| / (|o| + decay |w|) of each layer, on its device; 1 where either is 0."""
    large = torch.stack(torch._foreach_norm(weights))
    steep = torch.stack(torch._foreach_norm(others))
    ratios = trust * large / (steep + decay * large)
    return torch.where((large > 0) & (steep > 0), ratios, 1.0).unbind()
