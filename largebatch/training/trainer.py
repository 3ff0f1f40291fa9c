"""The loop: steps, metrics, evaluations and checkpoints, from wherever the run stands to its end."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from largebatch.data.source import Batches, ImageSource, Pass
from largebatch.distributed.environment import Ranks
from largebatch.errors import HealthError, UserError
from largebatch.recipe.order import EpochOrder
from largebatch.recipe.schedule import Schedule
from largebatch.report.metrics import MetricsWriter
from largebatch.report.progress import Progress
from largebatch.training.checkpoint import CheckpointFolder, TrainState, serialise
from largebatch.training.evaluation import evaluate
from largebatch.training.precision import make_autocast, make_scaler
from largebatch.training.settings import (
    CheckpointSettings,
    EvaluationSettings,
    ExecutionSettings,
    LoggingSettings,
)
from largebatch.training.step import TimedBatches, train_step
from largebatch.training.virtual_workers import VirtualWorkers


@dataclass
class _Interval:
    """Sums over the steps since the last metrics record; kept on the device until they are read."""

    loss: Tensor
    wrong: Tensor
    steps: int = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.loss += metrics["loss"]
        self.wrong += metrics["wrong"]
        self.steps += 1


@dataclass(frozen=True)
class Cadence:
    """After how many updates something is due: each `every` of them (none if 0) and at the end."""

    every: int
    total: int

    def due(self, step: int) -> bool:
        return step == self.total or (self.every > 0 and step % self.every == 0)


@dataclass
class Trainer:
    """A training run between two steps; `run` takes it to its end.

    All parts are made outside and are the same on every rank; metrics are written and checkpoints saved by
    rank 0 only.
    """

    virtual: VirtualWorkers
    optimizer: Optimizer
    schedule: Schedule
    order: EpochOrder
    train: ImageSource
    validation: ImageSource
    ranks: Ranks
    execution: ExecutionSettings
    evaluation: EvaluationSettings
    checkpointing: CheckpointSettings
    logging: LoggingSettings
    checkpoints: CheckpointFolder
    loss_factor: float = 1.0
    """Multiplies the gradients (the ablations of remarks 1 and 3)."""
    precise_steps: int = 0
    """Steps over which BatchNorm's statistics are recomputed before an evaluation; 0 for the running ones."""
    step: int = 0
    """Updates done."""
    recent_top1_errors: list[float] = field(default_factory=list)
    """Validation errors (percent) of the last five evaluations, newest last."""
    last_validation: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """Time in `run`, over all restarts."""
    train_seconds: float = 0.0
    """The same without evaluations and checkpoints."""

    def __post_init__(self) -> None:
        self.autocast = make_autocast(self.execution.precision, self.ranks.device)
        self.scaler = make_scaler(self.execution.precision, self.ranks.device)
        channels_last = self.execution.channels_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._interval = self._new_interval()

    # ---- state

    def state(self) -> TrainState:
        """All that a checkpoint holds. Waits for the device."""
        return TrainState(
            step=self.step,
            images_consumed=self.order.images_consumed(self.step),
            order_fingerprint=self.order.fingerprint(self.order.epoch_of(self.step)),
            model=self.virtual.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            interval={
                "loss": self._interval.loss,
                "wrong": self._interval.wrong,
                "steps": self._interval.steps,
            },
            recent_top1_errors=self.recent_top1_errors,
            last_validation=self.last_validation,
            seconds=self.seconds,
            train_seconds=self.train_seconds,
        )

    def restore(self, state: TrainState) -> None:
        """Go on from `state`. Raises UserError if this run has another order of images, or another model."""
        if state.images_consumed != self.order.images_consumed(state.step):
            raise UserError(
                f"the checkpoint has consumed {state.images_consumed} images in {state.step} steps, this run would "
                f"have {self.order.images_consumed(state.step)}; its batch section must be the same"
            )
        if state.order_fingerprint != self.order.fingerprint(self.order.epoch_of(state.step)):
            raise UserError(
                f"the checkpoint saw the images of epoch {self.order.epoch_of(state.step)} in another order than this "
                "run would; the data set and the seed must be the same"
            )
        try:
            self.virtual.model.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit this run's model, whose code has changed: {error}") from error
        self.scaler.load_state_dict(state.scaler)
        self._interval = _Interval(**state.interval)
        self.step = state.step
        self.recent_top1_errors = state.recent_top1_errors
        self.last_validation = state.last_validation
        self.seconds, self.train_seconds = state.seconds, state.train_seconds

    # ---- the loop

    def run(self, writer: MetricsWriter, progress: Progress) -> None:
        """Train to the end. Raises HealthError if the loss is not finite."""
        total = self.schedule.total_steps
        logs = Cadence(self.logging.every_steps, total)
        evaluations = Cadence(self._steps(self.evaluation.every_epochs), total)
        epochs = Cadence(self._steps(self.checkpointing.every_epochs or 0), total)
        steps = Cadence(self.checkpointing.every_steps or 0, total)
        clock = _Clock(self)
        self.virtual.model.train()
        with contextlib.closing(self._stream()) as stream:
            batches = TimedBatches(stream, self.memory_format)
            while self.step < total:
                self._interval.add(self._train_step(batches))
                self.step += 1
                evaluates = evaluations.due(self.step)
                saves = epochs.due(self.step) or steps.due(self.step)
                record: dict[str, float] = {}
                if evaluates or logs.due(self.step):
                    record = self._read_interval(clock, batches)
                elif saves:
                    self._check_health()
                clock.pause()
                if evaluates:
                    record.update(self._evaluate())
                if record:
                    writer.write(record)
                    progress.update(record)
                if saves:
                    self._save()
                clock.go_on()
        clock.pause()

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return train_step(
            self.virtual,
            self.optimizer,
            batches,
            step=self.step,
            lr=self.schedule.lr_at(self.step),
            autocast=self.autocast,
            scaler=self.scaler,
            loss_factor=self.loss_factor * self.schedule.loss_scale,
        )

    def _stream(self) -> Batches:
        return self.train.stream(self.passes(range(self.step, self.schedule.total_steps)), augment=True)

    def passes(self, steps: Iterable[int]) -> Iterator[Pass]:
        """The images of this rank's passes of `steps`, in order."""
        for step in steps:
            for workers in self.virtual.workers_by_pass:
                yield Pass(self.order.epoch_of(step), self.order.indices(step, workers))

    def _steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.order.steps_per_epoch)) if epochs else 0

    # ---- what happens between steps

    def _read_interval(self, clock: _Clock, batches: TimedBatches) -> dict[str, float]:
        """The metrics since the last record. Waits for the device."""
        self._check_health()
        interval, self._interval = self._interval, self._new_interval()
        images = interval.steps * self.order.global_batch
        timing = clock.read(batches.waited)
        return {
            "step": self.step,
            "epoch": self.step / self.order.steps_per_epoch,
            "train/loss": interval.loss.item() / interval.steps,
            "train/top1_error": 100.0 * interval.wrong.item() / images,
            "lr": self.schedule.lr_at(self.step - 1),
            "images_per_second": self.order.global_batch / timing.step,
            "data_wait": timing.data_wait,
        }

    def _check_health(self) -> None:
        if not math.isfinite(self._interval.loss.item()):
            raise HealthError(
                f"the training loss is {self._interval.loss.item()} by step {self.step} (learning rate "
                f"{self.schedule.lr_at(self.step - 1):g}); lower schedule.reference_lr, or warm up longer"
            )

    def _evaluate(self) -> dict[str, float]:
        with self.evaluation_statistics():
            self.last_validation = evaluate(
                self.virtual.model,
                self.validation,
                self.ranks,
                images_per_batch=self.evaluation.images_per_batch,
                autocast=self.autocast,
                memory_format=self.memory_format,
            )
        self.recent_top1_errors = [*self.recent_top1_errors, self.last_validation["val/top1_error"]][-5:]
        return {key: value for key, value in self.last_validation.items() if key != "val/images"}

    @contextlib.contextmanager
    def evaluation_statistics(self) -> Iterator[None]:
        """Inside, the model's buffers hold the BatchNorm statistics that evaluation and export use."""
        if not self.precise_steps:
            yield
            return
        batchnorm = self.virtual.batchnorm
        running = batchnorm.read()
        # The images of the epoch that has just been trained, from its start.
        epoch = self.order.epoch_of(max(0, self.step - 1))
        count = min(self.precise_steps, self.order.steps_per_epoch)
        first = epoch * self.order.steps_per_epoch
        with (
            contextlib.closing(self.train.stream(self.passes(range(first, first + count)), augment=True)) as stream,
            self.autocast(),
        ):
            precise = self.virtual.measure_statistics(TimedBatches(stream, self.memory_format), count)
        batchnorm.write(precise)
        yield
        batchnorm.write(running)

    def _save(self) -> None:
        if self.ranks.is_main:
            self.checkpoints.save(self.step, serialise(self.state()))

    def _new_interval(self) -> _Interval:
        device = self.ranks.device
        return _Interval(torch.zeros((), device=device), torch.zeros((), dtype=torch.float64, device=device))

    def summary(self) -> dict[str, float | int]:
        """`summary.json` of a finished run."""
        images = self.order.images_consumed(self.step)
        return {
            "top1_error": self.last_validation["val/top1_error"],
            "top1_error_median_last5": statistics.median(self.recent_top1_errors),
            "val_images": int(self.last_validation["val/images"]),
            "steps": self.step,
            "seconds": self.seconds,
            "images_per_second": images / self.train_seconds,
            "world_size": self.ranks.world_size,
            "global_batch": self.order.global_batch,
            "peak_lr": self.schedule.peak_lr,
        }


@dataclass(frozen=True)
class _Timing:
    step: float
    data_wait: float


class _Clock:
    """Wall time of the run: all of it, and that of the steps alone (evaluation and saving are pauses)."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._started = self._all_started = time.perf_counter()
        self._interval_seconds = 0.0
        self._interval_first_step = trainer.step
        self._waited = 0.0

    def pause(self) -> None:
        """Stop counting step time."""
        now = time.perf_counter()
        self._count(now)
        self._trainer.seconds += now - self._all_started
        self._all_started = now

    def go_on(self) -> None:
        """Count step time again; what passed since `pause` counts for the run as a whole only."""
        self._started = time.perf_counter()

    def read(self, waited: float) -> _Timing:
        """Seconds per step, and of them in waiting for data, since the last reading. The device is idle."""
        self._count(time.perf_counter())
        steps = self._trainer.step - self._interval_first_step
        timing = _Timing(self._interval_seconds / steps, (waited - self._waited) / steps)
        self._interval_seconds, self._interval_first_step, self._waited = 0.0, self._trainer.step, waited
        return timing

    def _count(self, now: float) -> None:
        self._interval_seconds += now - self._started
        self._trainer.train_seconds += now - self._started
        self._started = now
