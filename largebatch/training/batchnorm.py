"""BatchNorm as the paper means it: each virtual worker normalises its own n images, and the running
statistics see all k workers, once per step (contract 4)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from largebatch.errors import UserError
from largebatch.models.normalisation import batchnorm_modules

_STATISTICS = ("running_mean", "running_var")


class BatchNormStatistics:
    """The running statistics of a model whose virtual workers run one after another, on several ranks.

    While a step runs, each BatchNorm's running buffers are memory of our own, in which the kernel leaves the *batch*
    statistics of the newest pass: with PyTorch's momentum at 1 it writes them there for nothing. The model's own
    buffers come back after the step, moved once towards the average over all workers. A BatchNorm in evaluation mode
    (frozen) takes no part.
    """

    def __init__(self, model: nn.Module, *, workers_per_pass: int, momentum: float | None = None) -> None:
        """`momentum` is the weight of the old average; None keeps each module's own (1 - its momentum)."""
        modules = [module for _, module in batchnorm_modules(model)]
        self._tracking = [m for m in modules if m.track_running_stats and m.running_mean is not None]
        self._rate_of = {id(m): _rate(m, momentum) for m in self._tracking}
        self._open = False
        self._use(self._tracking)
        if workers_per_pass > 1:
            for module in modules:
                module.forward = functools.partial(_normalise_groups, module, workers_per_pass)  # type: ignore[method-assign]

    def _use(self, modules: list[_BatchNorm]) -> None:
        self._modules = modules
        own = [(m, name) for name in _STATISTICS for m in modules]
        sizes = [m.num_features for m, _ in own]
        rates = [self._rate_of[id(m)] for m, _ in own]
        buffers = [m._buffers[name] for m, name in own]
        self._buffers = [b for b in buffers if b is not None]
        dtype, device = (self._buffers[0].dtype, self._buffers[0].device) if own else (torch.float32, None)
        self._rates = torch.tensor(
            [rate for rate, size in zip(rates, sizes, strict=True) for _ in range(size)], dtype=torch.float64
        ).to(device)
        self.batch = torch.zeros(sum(sizes), dtype=dtype, device=device)
        """The newest pass's batch statistics, while a step is open: all means, then all variances (unbiased)."""
        # `.data`: parts of one memory, each with a version of its own, which autograd checks.
        parts = [part.data for part in self.batch.split(sizes)] if own else []
        self._places = list(zip(own, self._buffers, parts, strict=True))
        self._momenta = [m.momentum for m in modules]
        self._counters = [m.num_batches_tracked for m in modules]

    @property
    def size(self) -> int:
        """Elements of what `read` returns."""
        return self.batch.numel()

    def begin_step(self) -> None:
        """Until `finish_step` or `abandon_step` the modules write their batch statistics to `batch`."""
        active = [m for m in self._tracking if m.training]
        if [*map(id, active)] != [*map(id, self._modules)]:
            self._use(active)
        self._open = True
        self.batch.zero_()  # a momentum of 1 still multiplies what is there by 0: nan would stay
        for (module, name), _, place in self._places:
            module._buffers[name] = place
        for module in self._modules:
            module.momentum = 1.0
            module._buffers["num_batches_tracked"] = None  # a launch in each pass otherwise

    def read(self) -> Tensor:
        """A copy of the running statistics as one tensor, 1-D, laid out as `batch`."""
        return torch.cat([b.reshape(-1) for b in self._buffers]) if self._buffers else torch.zeros_like(self.batch)

    @torch.no_grad()
    def finish_step(self, batch_average: Tensor, finite: Tensor) -> None:
        """Move the running averages once towards the average of all workers' batch statistics, unless not `finite`:
        one such image would stay in them for ever."""
        if self._open and self._modules:
            before = self.read()
            moved = torch.lerp(before.double(), batch_average, self._rates).to(before.dtype)
            self.write(torch.where(finite, moved, before))
            torch._foreach_add_([counter for counter in self._counters if counter is not None], 1)
        self.abandon_step()

    def abandon_step(self) -> None:
        """Give the modules their own buffers back; does nothing if no step is open."""
        if not self._open:
            return
        self._open = False
        for (module, name), buffer, _ in self._places:
            module._buffers[name] = buffer
        for module, momentum, counter in zip(self._modules, self._momenta, self._counters, strict=True):
            module.momentum = momentum
            module._buffers["num_batches_tracked"] = counter

    @torch.no_grad()
    def write(self, statistics: Tensor) -> None:
        """The inverse of `read`."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, list(statistics.split([b.numel() for b in self._buffers])))


def _rate(module: _BatchNorm, momentum: float | None) -> float:
    if module.momentum == 0:  # frozen by its constructor
        return 0.0
    if momentum is not None:
        return 1.0 - momentum
    if module.momentum is None:
        raise UserError(
            "a BatchNorm of the model has momentum=None (a cumulative average), which has no rate per step; give the "
            "module a momentum, or set batchnorm.momentum"
        )
    return module.momentum


def _normalise_groups(module: _BatchNorm, groups: int, images: Tensor, *more: Any) -> Tensor:
    """BatchNorm of a pass of several virtual workers: each worker's images by themselves."""
    forward = type(module).forward
    if not module.training:
        return forward(module, images, *more)
    if torch.compiler.is_compiling() and forward is _BatchNorm.forward and not more:
        return _normalise_groups_at_once(module, groups, images)
    normalised, momentum = [], module.momentum
    for done, group in enumerate(images.chunk(groups)):
        # A rate of 1/(done + 1) leaves the mean of the groups' statistics in the running buffers. The module's own
        # forward is called, since a subclass may do more than normalise.
        module.momentum = 1.0 / (done + 1)
        normalised.append(forward(module, group, *more))
    module.momentum = momentum
    return torch.cat(normalised)


def _normalise_groups_at_once(module: _BatchNorm, groups: int, images: Tensor) -> Tensor:
    """The same as one expression, which a compiler fuses; inductor makes nan of chunks that are joined in bf16."""
    grouped = images.float().unflatten(0, (groups, -1))
    over = [d for d in range(grouped.dim()) if d not in (0, 2)]
    variance, mean = torch.var_mean(grouped, over, correction=0, keepdim=True)
    shape = [1, 1, -1] + [1] * (grouped.dim() - 3)
    normalised = (grouped - mean) * torch.rsqrt(variance + module.eps)
    if module.weight is not None:
        normalised = normalised * module.weight.view(shape) + module.bias.view(shape)
    if module.running_mean is not None and module.running_var is not None:
        count = grouped.numel() // (groups * grouped.shape[2])
        with torch.no_grad():
            module.running_mean.copy_(mean.mean(0).flatten())
            module.running_var.copy_(variance.mean(0).flatten() * (count / max(count - 1, 1)))
    return normalised.flatten(0, 1).to(images.dtype)
