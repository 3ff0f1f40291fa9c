"""One optimiser update."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from largebatch.training.optimizer import set_lr, update_if_finite
from largebatch.training.precision import Autocast
from largebatch.training.virtual_workers import VirtualWorkers

Batch = tuple[Tensor, Tensor]
"""Images float32 [n, C, H, W] (normalised) and labels int64 [n], on the device."""


class TimedBatches:
    """An iterator of batches that knows how long it was waited for."""

    def __init__(self, batches: Iterator[Batch], memory_format: torch.memory_format) -> None:
        self._batches = batches
        self._memory_format = memory_format
        self.waited = 0.0
        """Seconds spent in waiting for data so far."""

    def __iter__(self) -> TimedBatches:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        images, labels = next(self._batches)
        self.waited += time.perf_counter() - start
        return images.contiguous(memory_format=self._memory_format), labels


def train_step(
    virtual: VirtualWorkers,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    *,
    step: int,
    lr: float,
    autocast: Autocast,
    scaler: torch.amp.GradScaler,
    loss_factor: float = 1.0,
    flags: Tensor | None = None,
    measure_noise: bool = False,
) -> dict[str, Tensor]:
    """Update number `step`, with learning rate `lr`; takes this rank's passes from `batches`.

    Returns, on the device, for nothing here waits for it: ``loss`` (mean over the kn images), ``wrong`` (how many
    of them were classified wrongly), ``not_finite`` (whether loss or gradients were not, and the update is left
    out), ``passes_not_finite`` (this rank's passes whose loss was not) and ``flags`` (1-D, each pass's `flags`
    summed over all of them: a way to tell the other ranks something). `loss_factor` multiplies the gradients
    (the ablations of remarks 1 and 3). With `measure_noise` also ``noise``: tr(Σ) and |G|² of the gradients, float64
    [2] (see `largebatch.training.noise_scale`).
    """
    set_lr(optimizer, lr)
    scaled = scaler.is_enabled() or loss_factor != 1.0
    scale = (lambda share: scaler.scale(share * loss_factor)) if scaled else None
    losses = []
    multiplied = loss_factor * scaler.get_scale() if measure_noise else 1.0
    for _ in virtual.passes(step, measure_noise=measure_noise):
        images, labels = next(batches)
        with autocast():
            logits = virtual(images)
            loss = F.cross_entropy(logits, labels)
        wrong = (logits.detach().argmax(dim=1) != labels).sum()
        counts = wrong.reshape(1) if flags is None else torch.cat([wrong.reshape(1).to(flags.dtype), flags])
        virtual.backward(loss, also_sum=counts, scale=scale)
        losses.append(loss.detach())
    measured = {"noise": virtual.noise / multiplied**2} if virtual.noise is not None else {}
    return {
        **measured,
        "loss": virtual.loss,
        "wrong": virtual.sums[0],
        "flags": virtual.sums[1:],
        "not_finite": update_if_finite(optimizer, scaler, virtual.loss),
        "passes_not_finite": ~torch.stack(losses).isfinite(),
    }
