"""Mixed precision: autocast for bf16 and fp16, and the loss scaling that fp16 needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

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
        "than fp32; execution.precision=fp32 is faster, with different rounding"
    )


class LossScale:
    """Dynamic loss scaling for fp16: a power of two that halves after gradients that are not finite, and doubles after
    2,000 steps without. It follows the summed gradients, which all ranks share, so it does not depend on N."""

    _GROWTH_STEPS = 2000

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.scale = torch.tensor(2.0**16, device=device) if enabled else None
        """float32, []: multiplies the loss; None if it is not scaled."""
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, not_finite: Tensor) -> bool:
        """Take in whether a step's gradients were not finite (boolean, []); returns whether that is our business."""
        if self.scale is None:
            return False
        self._good_steps = torch.where(not_finite, 0, self._good_steps + 1)
        grows = self._good_steps >= self._GROWTH_STEPS
        self._good_steps = torch.where(grows, 0, self._good_steps)
        changed = torch.where(not_finite, self.scale / 2, torch.where(grows, self.scale * 2, self.scale))
        self.scale = changed.clamp(2.0**-24, 2.0**24)
        return True

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.scale is None else {"scale": self.scale, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.scale is not None:
            self.scale, self._good_steps = state["scale"], state["good_steps"]


def make_loss_scale(precision: str, device: torch.device) -> LossScale:
    """Loss scaling, which does nothing unless `precision` is ``fp16``."""
    return LossScale(device, enabled=precision == "fp16")
