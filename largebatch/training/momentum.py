"""Momentum with the learning rate inside its buffer, form (10) of the paper's §3; the base of our own optimizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer


class BufferedOptimizer(Optimizer, ABC):
    """An optimizer that keeps buffers for each parameter, which start at 0, and updates group by group."""

    buffers: ClassVar[tuple[str, ...]]
    """Their names in the state."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update with the gradients in ``p.grad`` (parameters without one are left alone)."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                for name in self.buffers:
                    if name not in self.state[parameter]:
                        self.state[parameter][name] = torch.zeros_like(parameter)
            if parameters:
                weights: list[Tensor] = [p.detach() for p in parameters]
                gradients = [p.grad for p in parameters if p.grad is not None]
                buffers = [[self.state[p][name] for p in parameters] for name in self.buffers]
                self._update(group, weights, gradients, buffers)

    @abstractmethod
    def _update(
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], buffers: list[list[Tensor]]
    ) -> None:
        """Change `weights` and `buffers` (one list of tensors for each name), in place; `gradients` are left as they
        are."""


class LrInsideSGD(BufferedOptimizer):
    """Momentum SGD with the learning rate inside the buffer, form (10) of the paper: v = m v + η g; w = w - v.

    With `corrected`, v is multiplied by η_new/η_old whenever η changes (momentum correction), and the
    trajectory is that of torch.optim.SGD; without, it is remark 2's pitfall.
    """

    buffers = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        momentum: float = 0.9,
        nesterov: bool = True,
        corrected: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "buffer_lr": 0.0}
        super().__init__(params, defaults)
        self._nesterov = nesterov
        self._corrected = corrected

    def _update(
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], buffers: list[list[Tensor]]
    ) -> None:
        lr, momentum, (velocities,) = group["lr"], group["momentum"], buffers
        updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        change = lr / group["buffer_lr"] if self._corrected and group["buffer_lr"] > 0 else 1.0
        torch._foreach_mul_(velocities, momentum * change)
        torch._foreach_add_(velocities, updates, alpha=lr)
        group["buffer_lr"] = lr
        if self._nesterov:
            torch._foreach_mul_(updates, lr)
            torch._foreach_add_(updates, velocities, alpha=momentum)
            torch._foreach_sub_(weights, updates)
        else:
            torch._foreach_sub_(weights, velocities)
