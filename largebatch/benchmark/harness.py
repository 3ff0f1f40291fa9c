"""One case, ready to run: `train`'s own step, whole or with a part of it left out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future
from torch.optim import SGD

from largebatch.benchmark.clock import Clock, make_clock
from largebatch.benchmark.memory import read_peak, reset_peak
from largebatch.config import Config
from largebatch.data.settings import IN_MEMORY
from largebatch.data.source import ImageSource
from largebatch.distributed.allreduce import NoExchange
from largebatch.distributed.environment import Ranks
from largebatch.distributed.exact import WIDE_STEPS
from largebatch.run import unsaved_trainer
from largebatch.training.step import Batch, TimedBatches, train_step

KINDS = ("compute", "update", "exchange", "whole")
"""Windows, each with one part more than the one before: forward and backward; the optimizer; the exchange of
gradients; real data."""
# Weights must move, since gradients that stay exactly zero (behind a γ of 0) are quicker on a GPU; but a step
# without exchange must not train replicas apart to where numbers overflow.
_LR = 1e-4
_WARMUP_STEPS = 3


@dataclass(frozen=True)
class Bucket:
    """A message of the step: how large it is, and when it was ready to be sent."""

    size: int
    """Bytes."""
    ready: float
    """Seconds from the start of the step."""


class _NoUpdate(SGD):
    """An optimizer that leaves the weights as they are."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        return None


class _Recorder:
    """An exchange that sends nothing and notes what it would have sent, and when."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sends_nothing = NoExchange()
        self.sizes: list[int] = []

    def start(self, buffer: Tensor) -> Future[Tensor]:
        self._clock.mark()
        self.sizes.append(buffer.numel() * buffer.element_size())
        return self._sends_nothing.start(buffer)


class Harness:
    """The step of one case on one of its ranks."""

    def __init__(self, config: Config, ranks: Ranks, sources: tuple[ImageSource, ImageSource]) -> None:
        """`config` is the case's own; all `ranks` make theirs at once, then `warm_up`."""
        self._held_by_others = reset_peak(ranks.device)
        self.ranks = ranks
        self._trainer = unsaved_trainer(config, ranks, sources)
        self.global_batch = self._trainer.order.global_batch
        self._no_update = _NoUpdate(self._trainer.virtual.model.parameters(), lr=_LR)
        # A real stream is timed when its queue has run through once: from then on it is as full as it stays.
        data = config.data
        self._queue = 0 if data.name in IN_MEMORY else data.loader_processes * data.prefetch
        self._steps = itertools.count()
        self._batch = self._make_batch(config, sources[0])
        self.peak_memory = 0
        """Bytes, of the steps of `warm_up`; on a CPU those of the whole process."""

    def warm_up(self) -> float:
        """Run a few steps of each kind; returns the seconds of one, of the slowest rank."""
        self.window("whole", WIDE_STEPS)  # the first steps send twice the bytes
        self.window("compute", 1)
        seconds = self.window("whole", _WARMUP_STEPS)[-1] / _WARMUP_STEPS
        self.peak_memory = read_peak(self.ranks.device) - self._held_by_others
        return max(self.ranks.gather(seconds))

    def window(self, kind: str, steps: int) -> list[float]:
        """Seconds from the start to the end of each of `steps` steps; all ranks start together.

        One step runs before them: what another case left in the caches is not this one's.
        """
        clock = make_clock(self.ranks.device)
        with self._parts(kind) as (batches, optimizer):
            self._step(batches, optimizer)
            self.ranks.barrier()
            clock.mark()
            for _ in range(steps):
                self._step(batches, optimizer)
                clock.mark()
            return clock.read()[1:]

    def buckets(self) -> tuple[list[Bucket], float]:
        """When which gradients are ready in a step without exchange, and the seconds of that step."""
        clock = make_clock(self.ranks.device)
        recorder = _Recorder(clock)
        with self._parts("compute") as (batches, optimizer), self._trainer.virtual.exchange_by(recorder):
            clock.mark()
            self._step(batches, optimizer)
            clock.mark()
        _, *ready, end = clock.read()
        return [Bucket(size, at) for size, at in zip(recorder.sizes, ready, strict=True)], end

    @contextlib.contextmanager
    def _parts(self, kind: str) -> Iterator[tuple[Iterator[Batch], Any]]:
        virtual = self._trainer.virtual
        with contextlib.ExitStack() as stack:
            if kind in ("compute", "update"):
                stack.enter_context(virtual.exchange_by(NoExchange()))
            batches: Iterator[Batch] = itertools.repeat(self._batch)
            if kind == "whole":
                batches = stack.enter_context(self._real_batches())
            yield batches, self._no_update if kind == "compute" else self._trainer.optimizer

    @contextlib.contextmanager
    def _real_batches(self) -> Iterator[Iterator[Batch]]:
        """The images of the next steps, through the loader that `train` uses."""
        per_step = len(self._trainer.virtual.workers_by_pass)
        untimed = -(-self._queue // per_step)
        # Endless, so that the loader works on at the end of the window as it does in its middle.
        passes = self._trainer.passes(itertools.count(next(self._steps)))
        with contextlib.closing(self._trainer.train.stream(passes, augment=True)) as stream:
            batches = TimedBatches(stream, self._trainer.memory_format)
            for _ in range(untimed):
                self._step(batches, self._trainer.optimizer)
            yield batches

    def _step(self, batches: Iterator[Batch], optimizer: Any) -> None:
        train_step(
            self._trainer.virtual,
            optimizer,
            batches,
            step=next(self._steps),
            lr=_LR,
            autocast=self._trainer.autocast,
            loss_scale=self._trainer.loss_scale,
            loss=self._trainer.loss,
            mix=self._trainer.mix,
        )

    def _make_batch(self, config: Config, train: ImageSource) -> Batch:
        """Images and labels of one pass, on the device."""
        count = config.batch.images_per_worker * config.execution.workers_per_pass
        device, generator = self.ranks.device, torch.Generator().manual_seed(config.seed)
        images = torch.randn(count, *train.shape, generator=generator).to(device)
        labels = torch.randint(train.classes, (count,), generator=generator).to(device)
        if config.data.multi_label:
            labels = torch.nn.functional.one_hot(labels, train.classes).float()
        return images.contiguous(memory_format=self._trainer.memory_format), labels
