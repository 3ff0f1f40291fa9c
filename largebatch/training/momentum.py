"""Optimizers whose momentum buffer has the learning rate inside: form (10) of the paper's §3."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class MomentumOptimizer(Optimizer, ABC):
    """An optimizer that keeps a buffer of momentum beside each parameter, and updates group by group."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update with the gradients in ``p.grad`` (parameters without one are left alone)."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            if parameters:
                weights: list[Tensor] = [p.detach() for p in parameters]
                gradients = [p.grad for p in parameters if p.grad is not None]
                self._update(group, weights, gradients, [self.state[p]["momentum_buffer"] for p in parameters])

    @abstractmethod
    def _update(
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor]
    ) -> None:
        """Change `weights` and `buffers`, in place; `gradients` are left as they are."""


class LrInsideSGD(MomentumOptimizer):
    """Momentum SGD with the learning rate inside the buffer, form (10) of the paper: v = m v + η g; w = w - v.

    With `corrected`, v is multiplied by η_new/η_old whenever η changes (momentum correction), and the
    trajectory is that of torch.optim.SGD; without, it is remark 2's pitfall.
    """

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
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor]
    ) -> None:
        lr, momentum = group["lr"], group["momentum"]
        updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        change = lr / group["buffer_lr"] if self._corrected and group["buffer_lr"] > 0 else 1.0
        torch._foreach_mul_(buffers, momentum * change)
        torch._foreach_add_(buffers, updates, alpha=lr)
        group["buffer_lr"] = lr
        if self._nesterov:
            torch._foreach_mul_(updates, lr)
            torch._foreach_add_(updates, buffers, alpha=momentum)
            torch._foreach_sub_(weights, updates)
        else:
            torch._foreach_sub_(weights, buffers)
