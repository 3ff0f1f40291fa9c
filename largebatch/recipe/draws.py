"""Random numbers as a pure function of their keys.

A draw is ``hash(seed, ..., index)``, not the next value of a generator's state. So it does not matter who
asks for it, in which order, or how many processes there are, and a resumed run has no generator state to
restore. The same arithmetic runs on NumPy arrays and on torch tensors, on any device.

The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

from typing import Any

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The two's complement int64 of an unsigned 64-bit value: neither NumPy nor torch mixes the two well."""
    return value - (1 << 64) if value >= 1 << 63 else value


def mix_int(value: int) -> int:
    """SplitMix64's finaliser of a Python integer, in [0, 2**64)."""
    value = (value ^ (value >> 30)) * _M1 & _MASK
    value = (value ^ (value >> 27)) * _M2 & _MASK
    return value ^ (value >> 31)


def mix_array(values: Any) -> Any:
    """The same for an int64 NumPy array or torch tensor (bits as two's complement); wraps on overflow."""
    # `>>` on int64 copies the sign bit: the mask makes it a logical shift.
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * _signed(_M1)
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * _signed(_M2)
    return values ^ ((values >> 31) & ((1 << 33) - 1))


def fold(*keys: int) -> int:
    """One 64-bit key made of several integers; the order of the keys counts."""
    state = 0
    for key in keys:
        state = mix_int((state + _GOLDEN + (key & _MASK)) & _MASK)
    return state


def bits(indices: Any, *keys: int) -> Any:
    """64 random bits, as int64, for each of ``indices`` (int64 NumPy array or torch tensor) under ``keys``."""
    return mix_array(mix_array(indices + _signed(_GOLDEN)) ^ _signed(fold(*keys)))


def uniform(indices: Any, *keys: int) -> Any:
    """A float64 in [0, 1) for each of ``indices`` (int64 NumPy array or torch tensor) under ``keys``."""
    mantissas = (bits(indices, *keys) >> 11) & ((1 << 53) - 1)
    # torch would make int64 times a Python float a float32, which rounds the largest draws up to 1.
    return (mantissas.double() if hasattr(mantissas, "double") else mantissas) * 2.0**-53
