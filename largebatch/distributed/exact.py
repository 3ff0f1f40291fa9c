"""Sums of gradients that do not depend on the order of addition (reduction ``reproducible``).

Floating-point addition depends on its order, integer addition does not. So each leaf's gradient (a leaf is one pass)
is rounded once, to whole multiples of a unit, and the backend adds integers: in any order, over any network, for any
deal of passes to ranks, the bits of the sum are the same. Rounding to a grid before adding is known from reproducible
sums in HPC and integer gradients from in-network aggregation; `docs/related.md` names both.

How fine the unit of a tensor is follows from its *bound*: the sum over the leaves of the largest absolute element,
decaying from step to step. `headroom` bits above the bound are left free, because gradients grow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.distributed.reductions import Bucket, Outcome, dense_strides


@dataclass(frozen=True)
class Grid:
    """The integers that are added."""

    dtype: torch.dtype
    bits: int
    """A sum below 2^bits fits."""
    headroom: int
    """Bits by which a tensor's sum may grow over its bound before it no longer fits."""
    coarse_bits: int
    """A sum fits if the certificate is below 2^coarse_bits; that of 2^15 leaves fits its own integer."""
    floor: float
    """No tensor's bound is below this share of the largest tensor's: a gradient may be 0 for a while."""


WIDE_STEPS = 8
"""So many first steps add int64: behind a last γ of 0 (§5.1) gradients start at 0, and grow about 16 times a step."""
# Where the last layer starts at zero, the first step's gradients before it are 0, and the next step's are as large as
# any other.
WIDE = Grid(torch.int64, 63, headroom=20, coarse_bits=47, floor=2.0**-8)
_MOST_LEAVES = 2**15 - 1  # more could overflow the certificate itself, as int32
_DECAY = 0.75  # of a bound, a step: one quiet step does not take the room that the next one needs
_UNKNOWN = 2.0**-9  # a bound before anything is known: with WIDE's headroom, sums up to 2,048 fit
_GUESS = 256.0  # after an overflow the true size is unknown: this many times the bound is tried next
_PIECE = 1 << 16  # elements that stay in a CPU's cache between rounding and adding


def narrow_grid(leaves: int) -> Grid:
    """int32, with less headroom the more leaves there are: a sum of many varies less from step to step."""
    if leaves > _MOST_LEAVES:
        return WIDE
    headroom = max(3, 7 - math.ceil(math.log2(leaves) / 2))
    return Grid(torch.int32, 31, headroom, coarse_bits=16, floor=2.0**-24)


class ExactSum:
    """Sums the leaves' gradients of one model, step after step.

    Two integers per tensor travel at the end of each bucket, the certificate: the sum over leaves of max|q|, in coarse
    units of 2^(bits - coarse_bits) and rounded up, and the number of leaves whose gradient was not finite. Below
    2^coarse_bits no sum of that tensor can have overflowed; otherwise the step must not be applied. The same number is
    the next step's bound, so all ranks compute the same units without a message of their own.
    """

    takes_each_pass = True

    def __init__(self, parameters: Sequence[nn.Parameter], leaves: int, compression: str = "none") -> None:
        assert compression == "none", "the config is checked"
        self._parameters = list(parameters)
        device = self._parameters[0].device
        self._dtype = torch.float32
        for parameter in self._parameters:
            self._dtype = torch.promote_types(self._dtype, parameter.dtype)
        self._narrow = WIDE if self._dtype == torch.float64 else narrow_grid(leaves)
        self._grid = WIDE
        self._bound = torch.zeros(len(self._parameters), dtype=torch.float64, device=device)
        self._steps = 0
        self._certificate = torch.zeros(2, len(self._parameters), dtype=torch.int64, device=device)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._scaled: _Flat | None = None
        self._held: _Flat | None = None
        self._holds_any = False

    def begin_step(self, loss_scale: Tensor | None = None) -> None:
        """Choose the units; gradients will come multiplied by `loss_scale`, and their sum be divided by it."""
        self._grid = grid = WIDE if self._steps < WIDE_STEPS else self._narrow
        if self._held is not None and self._held.memory.dtype != grid.dtype:
            self._held = None
        self._holds_any = False
        top = self._bound.max()
        self._used = torch.where(top > 0, torch.maximum(self._bound, top * grid.floor), _UNKNOWN)
        # bound < 2^exponent. Clamped so that neither the unit nor its inverse leaves float32.
        exponent = (torch.frexp(self._used).exponent + (grid.headroom - grid.bits)).clamp(-100, 100)
        self._unit = _power_of_two(exponent)
        per_unit = _power_of_two(-exponent)
        factors = per_unit if loss_scale is None else per_unit / loss_scale
        self._factors = list(factors.to(self._dtype).unbind())
        self._coarse_per_unit = factors * 2.0 ** (grid.coarse_bits - grid.bits)
        self._units = list(self._unit.to(self._dtype).unbind())
        self._certificate.zero_()

    def take(self) -> None:
        """Add a leaf's gradients, which are in every ``p.grad``, to this rank's sum, and leave ``p.grad`` empty."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._certify(range(len(gradients)), gradients)
        if self._scaled is None:
            self._scaled = _Flat(self._parameters, self._dtype)
        torch._foreach_copy_(self._scaled.views, gradients)
        for parameter in self._parameters:
            parameter.grad = None
        torch._foreach_mul_(self._scaled.views, self._factors)
        if self._held is None:
            self._held = _Flat(self._parameters, self._grid.dtype)
        for new, held in zip(self._scaled.pieces, self._held.pieces, strict=True):
            whole = new.round_()
            if self._holds_any:
                held.add_(whole.to(held.dtype))
            else:
                held.copy_(whole)
        self._holds_any = True

    def outgoing(self, bucket: Bucket) -> Tensor:
        """What this rank sends for `bucket`, whose buffer holds the last leaf's gradients and is overwritten: its sum
        and the certificate."""
        self._certify(bucket.positions, bucket.gradients)
        torch._foreach_mul_(bucket.gradients, [self._factors[i] for i in bucket.positions])
        size = bucket.buffer.numel()
        wire = torch.empty(size + 2 * len(bucket.positions), dtype=self._grid.dtype, device=bucket.buffer.device)
        wire[:size].copy_(bucket.buffer.round_())
        if self._holds_any and self._held is not None:
            torch._foreach_add_(bucket.views(wire), [self._held.views[i] for i in bucket.positions])
        wire[size:] = self._certificate[:, self._index(bucket.positions)].flatten()
        return wire

    def incoming(self, total: Tensor, bucket: Bucket) -> Tensor:
        """Turn what `outgoing` returned, summed over ranks, into the bucket's gradients; returns its buffer."""
        size = bucket.buffer.numel()
        bucket.buffer.copy_(total[:size])  # rounds to nearest: the only other rounding
        torch._foreach_mul_(bucket.gradients, [self._units[i] for i in bucket.positions])
        self._certificate[:, self._index(bucket.positions)] = total[size:].view(2, -1).long()
        return bucket.buffer

    def finish_alone(self) -> None:
        """Without other ranks: leave the sum in every ``p.grad``."""
        assert self._held is not None, "every step has a pass"
        for parameter, held, unit in zip(self._parameters, self._held.views, self._units, strict=True):
            parameter.grad = held.to(parameter.dtype).mul_(unit)

    def end_step(self) -> Outcome:
        """What the certificate says; from it follow the next step's units."""
        coarse, not_finite = self._certificate[0], self._certificate[1] > 0
        overflowed = coarse >= 2**self._grid.coarse_bits
        seen = coarse.double() * 2.0 ** (self._grid.bits - self._grid.coarse_bits) * self._unit
        bound = torch.where(overflowed, self._used * _GUESS, torch.maximum(self._bound * _DECAY, seen))
        self._bound = torch.where(not_finite, self._bound, bound)
        self._steps += 1
        return Outcome(not_finite.any(), overflowed)

    def state_dict(self) -> dict[str, Any]:
        return {"bound": self._bound, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if `state` is that of another model."""
        if state["bound"].shape != self._bound.shape:
            raise ValueError(f"the checkpoint has {len(state['bound'])} trainable tensors, not {len(self._bound)}")
        self._bound, self._steps = state["bound"].to(self._bound), state["steps"]

    def _certify(self, positions: Sequence[int], gradients: list[Tensor]) -> None:
        index = self._index(positions)
        largest = _largest(gradients).double()
        finite = largest.isfinite()
        coarse = (largest * self._coarse_per_unit[index]).ceil().clamp(max=2.0**self._grid.coarse_bits)
        self._certificate[0, index] += torch.where(finite, coarse, 0.0).long()
        self._certificate[1, index] += ~finite

    def _index(self, positions: Sequence[int]) -> Tensor:
        """`positions` on the device: a bucket keeps its parameters, so they are sent there once."""
        key = tuple(positions)
        if key not in self._indices:
            self._indices[key] = torch.tensor(key, device=self._bound.device)
        return self._indices[key]


class _Flat:
    """Memory for one number per element of the parameters, and a view of it in the shape and strides of each."""

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        sizes = [p.numel() for p in parameters]
        self.memory = torch.zeros(sum(sizes), dtype=dtype, device=parameters[0].device)
        parts = self.memory.split(sizes)
        self.views = [part.as_strided(p.shape, dense_strides(p)) for part, p in zip(parts, parameters, strict=True)]
        piece = len(self.memory) if self.memory.is_cuda else _PIECE
        self.pieces = self.memory.split(max(1, piece))


def _largest(gradients: list[Tensor]) -> Tensor:
    """The largest absolute element of each gradient, 1-D; nan where one is nan. A maximum has no order of its own."""
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(gradients, math.inf))
    extremes = [g.aminmax() if g.numel() else (g.new_zeros(()), g.new_zeros(())) for g in gradients]
    lowest, highest = (torch.stack([pair[i] for pair in extremes]) for i in (0, 1))
    return torch.maximum(highest, -lowest)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, made of its bits: a device's `pow` may be off by the last one."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)
