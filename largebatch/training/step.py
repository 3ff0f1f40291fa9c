"""One optimiser update."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from largebatch.data.mixing import Mixing
from largebatch.training.loss import Loss
from largebatch.training.optimizer import set_lr, update_unless
from largebatch.training.precision import Autocast, LossScale
from largebatch.training.virtual_workers import VirtualWorkers

Batch = tuple[Tensor, Tensor]
"""Images float32 [n, C, H, W] (normalised) and labels int64 [n] or float32 [n, classes], on the device."""


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

    def peek(self) -> Batch:
        """The next batch, which comes again."""
        batch = next(self)
        self._batches = itertools.chain([batch], self._batches)
        return batch


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, on the device: nothing here waits for it."""

    sums: dict[str, Tensor]
    """Metrics by name: ``loss``, the mean over the kn images; ``wrong``, how many were classified wrongly; ``noise``,
    if it was measured: tr(Σ) and |G|² of the gradients, and 1."""
    flags: Tensor
    """float64 [flags]: each pass's flags summed over all of them."""
    not_finite: Tensor
    """Boolean, []: loss or gradients were not finite, and the update is left out."""
    overflowed: Tensor
    """Boolean, [parameters]: these tensors' sums may not be exact, and the update is left out."""
    passes_not_finite: Tensor
    """Boolean, [passes]: this rank's passes whose loss was not finite."""
    arrived: Tensor
    """Boolean, [passes of all ranks]: which of them the step is made of; empty where none can be left out."""


def train_step(
    virtual: VirtualWorkers,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    *,
    step: int,
    lr: float,
    autocast: Autocast,
    loss_scale: LossScale,
    loss_factor: float = 1.0,
    loss: Loss = F.cross_entropy,
    mix: Mixing | None = None,
    flags: Tensor | None = None,
    measure_noise: bool = False,
) -> StepResult:
    """Update number `step`, with learning rate `lr`; takes this rank's passes from `batches`.

    `mix` blends a pass's images and turns its labels into probabilities; an image then counts as wrong unless its most
    probable class is found. `flags`, 1-D, is summed over all passes: a way to pass something to the other ranks.
    `loss_factor` multiplies the gradients (the ablations of remarks 1 and 3). `measure_noise` measures the gradient
    noise scale (see `largebatch.training.noise_scale`).
    """
    set_lr(optimizer, lr)
    losses = []
    own = {} if flags is None else {"flags": flags}
    # One autocast around all passes: weights are cast once a step.
    with virtual.step(step, loss_scale=loss_scale.scale, measure_noise=measure_noise) as passes, autocast():
        for workers in passes:
            images, labels = next(batches)
            targets = labels
            if mix is not None:
                images, targets = mix(images, labels, step, workers)
                labels = targets.argmax(dim=1) if labels.ndim == 1 else targets
            logits = virtual(images)
            mean = loss(logits, targets)
            best = logits.detach().argmax(dim=1)
            wrong = (best != labels if labels.ndim == 1 else labels.gather(1, best[:, None]) == 0).sum()
            virtual.backward(mean, sums={"wrong": wrong, **own}, factor=loss_factor)
            losses.append(mean.detach())
    bad_loss, bad_gradients = ~virtual.loss.isfinite(), virtual.outcome.not_finite
    left_out = bad_loss | bad_gradients | virtual.outcome.overflowed.any()
    update_unless(left_out, optimizer)
    sums = {"loss": virtual.loss, "wrong": virtual.sums["wrong"]}
    if virtual.noise is not None:
        noise = virtual.noise / loss_factor**2
        sums["noise"] = torch.where(noise.isfinite().all(), torch.cat([noise, torch.ones_like(noise[:1])]), 0.0)
    # With loss scaling, gradients that are not finite are the scale's business, which is lowered; only the loss counts.
    not_finite = bad_loss if loss_scale.update(bad_gradients) else bad_loss | bad_gradients
    return StepResult(
        sums=sums,
        flags=virtual.sums.get("flags", torch.zeros(0)),
        not_finite=not_finite,
        overflowed=virtual.outcome.overflowed,
        passes_not_finite=~torch.stack(losses).isfinite(),
        arrived=virtual.arrived,
    )
