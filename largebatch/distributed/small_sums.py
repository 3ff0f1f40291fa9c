"""Exact sums of short vectors: losses, counts, BatchNorm's statistics.

Fixed point in two int64 a number, whole and fraction: 2^-48 is finer than any float32 above 2^-24, and than what
BatchNorm's ε makes of a variance. No state, no unit: integers add in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FRACTION = 2.0**48
_LARGEST = 2.0**47  # so that 2^15 leaves fit


def encode(values: Tensor) -> Tensor:
    """`values`, 1-D, as int64 that may be added; those that are not finite count as 0 and are counted."""
    wide = values.double()
    fits = wide.abs() < _LARGEST  # false for nan
    wide = torch.where(fits, wide, 0.0)
    whole = wide.floor()
    fraction = ((wide - whole) * _FRACTION).round()
    return torch.cat([whole, fraction, (~fits).sum().reshape(1)]).long()


def decode(total: Tensor) -> tuple[Tensor, Tensor]:
    """The sums, float64 1-D, and whether all that was added was finite (boolean, [])."""
    whole, fraction = total[:-1].view(2, -1).double()
    return whole + fraction / _FRACTION, total[-1] == 0
