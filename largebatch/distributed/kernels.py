"""Which kernels a device may use, and what of it decides the bits of a result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def deterministic(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """Inside, a GPU uses kernels that add in one order; the settings of before come back.

    An operation that has no such kernel only warns, since a user's model may need it: torch names it.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else memory that is about to be written is filled first: 1,445 launches in a pass of ResNet-50.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round float32 factors to 10 bits of mantissa; torch's default does in convolutions alone."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def describe_device(device: torch.device) -> str:
    """What must be equal for two ranks to compute the same bits."""
    if device.type != "cuda":
        return f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name} with {facts.multi_processor_count} multiprocessors, cuDNN {torch.backends.cudnn.version()}"
