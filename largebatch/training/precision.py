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


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Dynamic loss scaling, which does nothing unless `precision` is ``fp16``.

    Its scale follows the summed gradients, which all ranks share, so it does not depend on N either.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
