"""Mixed precision: autocast for bf16 and fp16, and the loss scaling that fp16 needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

Autocast = Callable[[], contextlib.AbstractContextManager[object]]


def make_autocast(precision: str, device: torch.device) -> Autocast:
    """The context in which forward passes run: ``fp32`` (nothing), ``bf16`` or ``fp16``."""
    if precision == "fp32":
        return contextlib.nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return lambda: torch.autocast(device.type, dtype=dtype)


def slow_precision(precision: str, device: torch.device) -> str:
    """A warning if this device has no instructions for `precision` and emulates it; empty if it has.

    The answer is that of oneDNN, which computes torch's convolutions on CPUs.
    """
    supported = {
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if device.type != "cpu" or precision not in supported or supported[precision]():
        return ""
    return (
        f"execution.precision: this CPU has no instructions for {precision} and emulates them, up to ten times slower "
        "than fp32; execution.precision=fp32 is quicker, with other rounding"
    )


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Dynamic loss scaling, which does nothing unless `precision` is ``fp16``.

    Its scale follows the summed gradients, which all ranks share, so it does not depend on N either.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
