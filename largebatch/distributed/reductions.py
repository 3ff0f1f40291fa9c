"""What happens to the gradients between a rank's passes and the sum over all of them, and the plain way to do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Layout = Sequence[tuple[int, torch.Size, tuple[int, ...]]]
"""For each parameter of a bucket: the offset of its first element, its shape and its strides."""


class Bucket:
    """Gradients of some parameters that are exchanged together, one after the other in `buffer`."""

    def __init__(self, positions: Sequence[int], buffer: Tensor, layout: Layout) -> None:
        """`positions` are the parameters' among all trainable ones; `layout` is their order in `buffer`."""
        self.positions = positions
        self.buffer = buffer
        self._layout = layout
        self.gradients = self.views(buffer)

    def empty(self) -> Bucket:
        """One of the same parameters and layout, in memory of its own, all zeros."""
        return Bucket(self.positions, torch.zeros_like(self.buffer), self._layout)

    def views(self, memory: Tensor) -> list[Tensor]:
        """A view of `memory`, laid out as the buffer is, for each parameter."""
        start = memory.storage_offset()
        return [memory.as_strided(shape, strides, start + offset) for offset, shape, strides in self._layout]


def dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Strides that fill memory without gaps, in the parameter's own order of dimensions (channels_last, say) if it has
    one."""
    order = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
    if parameter.permute(order).is_contiguous():
        return parameter.stride()
    return torch.empty(parameter.shape, device="meta").stride()


@dataclass(frozen=True)
class Outcome:
    """Whether a step's sum may be applied; on the device."""

    not_finite: Tensor
    """Boolean, []: some gradient was not finite."""
    overflowed: Tensor
    """Boolean, [parameters]: whose sum may have overflowed."""


class Reduction(Protocol):
    """Sums the gradients of a step's passes, over this rank's and then over all ranks."""

    takes_each_pass: bool
    """Whether `take` is to be called after each of a rank's passes but the last; else autograd adds them up."""

    def begin_step(self, loss_scale: Tensor | None = None) -> None: ...

    def take(self) -> None: ...

    def outgoing(self, bucket: Bucket) -> Tensor: ...

    def incoming(self, total: Tensor, bucket: Bucket) -> Tensor: ...

    def finish_alone(self) -> None: ...

    def end_step(self) -> Outcome: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FloatSum:
    """Autograd adds up a rank's passes, the backend the ranks: equal on any N up to rounding (reduction ``fast``)."""

    takes_each_pass = False

    def __init__(self, parameters: Sequence[nn.Parameter], leaves: int, compression: str = "none") -> None:
        """`compression` ``fp16`` or ``bf16`` rounds gradients to it before they are sent, and adds in it."""
        self._parameters = list(parameters)
        self._sent_as = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[compression]
        self._loss_scale: Tensor | None = None

    def begin_step(self, loss_scale: Tensor | None = None) -> None:
        """Gradients will come multiplied by `loss_scale`, a power of two; their sum is divided by it."""
        self._loss_scale = loss_scale

    def take(self) -> None:
        raise AssertionError("takes_each_pass is false")

    def outgoing(self, bucket: Bucket) -> Tensor:
        return bucket.buffer if self._sent_as is None else bucket.buffer.to(self._sent_as)

    def incoming(self, total: Tensor, bucket: Bucket) -> Tensor:
        if self._sent_as is not None:
            bucket.buffer.copy_(total)
        return bucket.buffer if self._loss_scale is None else bucket.buffer.div_(self._loss_scale)

    def finish_alone(self) -> None:
        if self._loss_scale is not None:
            torch._foreach_div_(self._gradients(), self._loss_scale)

    def end_step(self) -> Outcome:
        gradients = self._gradients()
        found = torch.zeros((), device=gradients[0].device)
        # GradScaler's own check, with a scale of 1: one pass over the memory.
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones_like(found))
        return Outcome(found > 0, torch.zeros(len(gradients), dtype=torch.bool, device=found.device))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is carried from step to step."""

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]
