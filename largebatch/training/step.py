"""One optimiser update."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from largebatch.training.optimizer import set_lr
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
) -> dict[str, Tensor]:
    """Update number `step`, with learning rate `lr`; takes this rank's passes from `batches`.

    Returns ``loss`` (mean over the kn images) and ``wrong`` (how many of them were classified wrongly), on the
    device: nothing here waits for it. `loss_factor` multiplies the gradients (the ablations of remarks 1 and 3).
    """
    set_lr(optimizer, lr)
    for _ in virtual.passes(step):
        images, labels = next(batches)
        with autocast():
            logits = virtual(images)
            loss = F.cross_entropy(logits, labels)
        wrong = (logits.detach().argmax(dim=1) != labels).sum()
        virtual.backward(loss, also_sum=wrong.reshape(1), scale=lambda share: scaler.scale(share * loss_factor))
    scaler.step(optimizer)
    scaler.update()
    return {"loss": virtual.loss, "wrong": virtual.sums[0]}
