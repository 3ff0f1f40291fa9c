"""BatchNorm as the paper means it: each virtual worker normalises its own n images, and the running
statistics see all k workers, once a step (contract 4)."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from largebatch.errors import UserError
from largebatch.models.normalisation import batchnorm_modules


class BatchNormStatistics:
    """The running statistics of a model whose virtual workers run one after another, on several ranks.

    While a step runs, each BatchNorm's running buffers hold the *batch* statistics of the newest pass: with
    PyTorch's momentum at 1 the kernel writes them there for nothing. `finish_step` puts the running averages
    back, moved towards the average over all workers, so between steps the buffers are what evaluation needs.
    """

    def __init__(self, model: nn.Module, *, workers_per_pass: int, momentum: float | None = None) -> None:
        """`momentum` is the weight of the old average; None keeps each module's own (1 - its momentum)."""
        modules = [module for _, module in batchnorm_modules(model)]
        self._modules = [m for m in modules if m.track_running_stats]
        rates = [_rate(module, momentum) for module in self._modules]
        sizes = [module.num_features for module in self._modules]
        per_channel = [rate for rate, size in zip(rates, sizes, strict=True) for _ in range(size)]
        self._rates = torch.tensor(per_channel * 2, dtype=torch.float64)
        self._momenta = [module.momentum for module in self._modules]
        # Kept, because nn.Module looks a buffer up anew each time, and they are read after each pass.
        self.buffers = [_buffer(m, kind) for kind in ("mean", "var") for m in self._modules]
        """All running means, then all running variances (unbiased), as the modules hold them."""
        self._counters = [m.num_batches_tracked for m in self._modules if m.num_batches_tracked is not None]
        if workers_per_pass > 1:
            for module in modules:
                module.forward = functools.partial(_normalise_groups, module, workers_per_pass)  # type: ignore[method-assign]
        self._saved: Tensor | None = None
        self._steps: list[Tensor] = []

    @property
    def size(self) -> int:
        """Elements of what `read` returns."""
        return self._rates.numel()

    def begin_step(self) -> None:
        """Keep the running averages; until `finish_step` the buffers hold batch statistics."""
        if self._modules:
            self._saved = self.read()
            self._steps = [counter.clone() for counter in self._counters]
            for module in self._modules:
                module.momentum = 1.0

    def read(self) -> Tensor:
        """A copy of `buffers` as one tensor, 1-D."""
        return torch.cat(self.buffers) if self.buffers else torch.zeros(0)

    @torch.no_grad()
    def finish_step(self, batch_average: Tensor) -> None:
        """Move the running averages once towards the average of all workers' batch statistics."""
        if self._saved is None:
            return
        self._rates = self._rates.to(self._saved)
        average = batch_average.to(self._saved)
        # One image that is not finite would stay in the running averages for ever: such a step leaves them alone.
        moved = torch.where(average.isfinite().all(), torch.lerp(self._saved, average, self._rates), self._saved)
        self._restore(moved, tracked_steps=1)

    @torch.no_grad()
    def abandon_step(self) -> None:
        """Put the running averages back as `begin_step` found them."""
        if self._saved is not None:
            self._restore(self._saved, tracked_steps=0)

    def _restore(self, statistics: Tensor, *, tracked_steps: int) -> None:
        self.write(statistics)
        for module, momentum in zip(self._modules, self._momenta, strict=True):
            module.momentum = momentum
        for counter, before in zip(self._counters, self._steps, strict=True):
            counter.copy_(before + tracked_steps)
        self._saved = None

    @torch.no_grad()
    def write(self, statistics: Tensor) -> None:
        """The inverse of `read`."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, list(statistics.split([b.numel() for b in self.buffers])))


def _rate(module: _BatchNorm, momentum: float | None) -> float:
    if momentum is not None:
        return 1.0 - momentum
    if module.momentum is None:
        raise UserError(
            "a BatchNorm of the model has momentum=None (a cumulative average), which has no rate per step; give the "
            "module a momentum, or set batchnorm.momentum"
        )
    return module.momentum


def _buffer(module: _BatchNorm, kind: Literal["mean", "var"]) -> Tensor:
    buffer = module.running_mean if kind == "mean" else module.running_var
    assert buffer is not None, "only modules that track running statistics are kept"
    return buffer


def _normalise_groups(module: _BatchNorm, groups: int, images: Tensor) -> Tensor:
    """BatchNorm of a pass of several virtual workers: each worker's images by themselves."""
    if not module.training:
        return type(module).forward(module, images)
    normalised = []
    for done, group in enumerate(images.chunk(groups)):
        # A rate of 1/(done + 1) leaves the mean of the groups' statistics in the running buffers.
        rate = 1.0 / (done + 1)
        normalised.append(
            F.batch_norm(
                group,
                module.running_mean,
                module.running_var,
                module.weight,
                module.bias,
                True,
                rate,
                module.eps,
            )
        )
    return torch.cat(normalised)
