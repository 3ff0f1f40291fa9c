"""The loop: steps, metrics, evaluations and checkpoints, from wherever the run stands to its end."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from largebatch.data.mixing import Mixing
from largebatch.data.source import Batches, ImageSource, Pass
from largebatch.distributed.environment import Ranks
from largebatch.errors import CheckpointError, HealthError, Preempted, UserError
from largebatch.recipe.order import EpochOrder
from largebatch.recipe.resize import Resize
from largebatch.recipe.schedule import Schedule
from largebatch.report.metrics import MetricsWriter
from largebatch.report.progress import Progress
from largebatch.report.samples import draw_samples
from largebatch.training.averaging import WeightAverage
from largebatch.training.best import BestWeights, weights_of
from largebatch.training.checkpoint import CheckpointFolder, TrainState
from largebatch.training.dealing import Dealer, ReplayedDeals
from largebatch.training.evaluation import evaluate
from largebatch.training.facts import FactReader, StepFacts, flags_on
from largebatch.training.interval import Interval
from largebatch.training.loss import Loss
from largebatch.training.optimizer import restore_optimizer
from largebatch.training.precision import make_autocast, make_loss_scale
from largebatch.training.preemption import StopRequest
from largebatch.training.replicas import check_replicas, digest_of
from largebatch.training.saver import BackgroundSaver
from largebatch.training.settings import (
    CheckpointSettings,
    EvaluationSettings,
    ExecutionSettings,
    HealthSettings,
    LoggingSettings,
)
from largebatch.training.step import TimedBatches, train_step
from largebatch.training.stragglers import StragglerWatch, gather_pace
from largebatch.training.virtual_workers import VirtualWorkers


@dataclass(frozen=True)
class Cadence:
    """After how many updates something is due: each `every` of them (none if 0) from `start` on, and at the end."""

    every: int
    total: int
    start: int = 0

    def due(self, step: int) -> bool:
        return step == self.total or (self.every > 0 and (step - self.start) % self.every == 0)


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
    health: HealthSettings
    logging: LoggingSettings
    checkpoints: CheckpointFolder
    stop_request: StopRequest = field(default_factory=StopRequest)
    """Raised by a signal: the ranks then stop together after a step, with a checkpoint."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the sources hold, for a later resume to compare."""
    devices: list[str] = field(default_factory=list)
    """What the ranks compute on."""
    skipped_steps: int = 0
    """Updates left out so far, since they were not finite or not exact."""
    absent: dict[int, list[int]] = field(default_factory=dict)
    """Passes that did not arrive so far, by step, where there were any."""
    skipped_images: int = 0
    """Training images that another stood in for, before this process started."""
    average: WeightAverage | None = None
    """Of the weights, over the updates (`ema.decay`)."""
    best: BestWeights | None = None
    """Where the weights of the best evaluation are kept (`checkpoint.keep_best`)."""
    resize: Resize | None = None
    """The newest change of the minibatch (`batch.on_resize: rescale`), which `order` and `schedule` follow."""
    loss_factor: float = 1.0
    """Multiplies the gradients (the ablations of remarks 1 and 3)."""
    loss: Loss = F.cross_entropy
    """What is minimised."""
    mix: Mixing | None = None
    """Blends the images of each virtual worker (mixup, CutMix)."""
    backup_workers: int = 0
    """How many of the order's workers are beyond the k of the recipe."""
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
        self.loss_scale = make_loss_scale(self.execution.precision, self.ranks.device)
        channels_last = self.execution.channels_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._interval = Interval()
        self._saver = BackgroundSaver(self.checkpoints)
        self._facts = FactReader(self.ranks.device)
        self._last_save = time.monotonic()
        self._write_errors: dict[str, OSError] = {}
        self._stragglers = StragglerWatch(self.ranks, factor=self.health.straggler_factor)
        self.dealer = Dealer(self.virtual.deal, measured=self.execution.deal == "measured")
        """Says by which deal each step runs."""
        self._asked = self._passes = 0
        self._unread: deque[int] = deque()
        """The step of each pass that the loader was asked for and has not given."""

    # ---- state

    def state(self, *, skipped_images: int) -> TrainState:
        """All that a checkpoint holds. Waits for the device."""
        return TrainState(
            step=self.step,
            images_consumed=self.order.images_consumed(self.step),
            order_fingerprint=self.order.fingerprint(self.order.epoch_of(self.step)),
            data=self.data,
            devices=self.devices,
            skipped_steps=self.skipped_steps,
            skipped_images=skipped_images,
            absent=self.absent,
            virtual_workers=self.virtual.virtual_workers,
            world_size=self.ranks.world_size,
            resize=asdict(self.resize) if self.resize else None,
            model=self.virtual.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.average.state_dict() if self.average else {},
            loss_scale=self.loss_scale.state_dict(),
            reduction=self.virtual.reduction.state_dict(),
            interval=self._interval.state_dict(),
            recent_top1_errors=self.recent_top1_errors,
            last_validation=self.last_validation,
            best=self.best.state if self.best else {},
            seconds=self.seconds,
            train_seconds=self.train_seconds,
        )

    def restore(self, state: TrainState) -> None:
        """Go on from `state`, which came by this run's order of images. Raises UserError if it has another model."""
        try:
            self.virtual.model.load_state_dict(state.model)
            restore_optimizer(self.optimizer, state.optimizer)
            self.virtual.reduction.load_state_dict(state.reduction)
            if self.average:
                self.average.load_state_dict(state.ema)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit this run's model, whose code has changed: {error}") from error
        self.loss_scale.load_state_dict(state.loss_scale)
        if self.best and self.ranks.is_main:
            self.best.restore(state.best)
        if self.resize is None or self.resize.step != state.step:
            self._interval = Interval(**state.interval)  # else its steps had another minibatch
        self.step, self.skipped_steps = state.step, state.skipped_steps
        self.skipped_images, self.absent = state.skipped_images, state.absent
        self.recent_top1_errors = state.recent_top1_errors
        self.last_validation = state.last_validation
        self.seconds, self.train_seconds = state.seconds, state.train_seconds

    def replay(self, passes: int, absent: Mapping[int, Sequence[int]]) -> None:
        """Make each step of the passes that arrived in a recorded run (see `ReplayedDeals`)."""
        self.dealer = ReplayedDeals(self.virtual.deal, passes, absent)
        self.virtual.gate = None

    # ---- the loop

    def run(self, writer: MetricsWriter, progress: Progress) -> None:
        """Train to the end.

        Raises HealthError if the loss is not finite or the replicas differ, Preempted after the checkpoint that
        a stop request asks for, and CheckpointError if one cannot be written.
        """
        total = self.schedule.total_steps
        logs = Cadence(self.logging.every_steps, total)
        evaluations = self._each_epochs(self.evaluation.every_epochs)
        clock = _Clock(self)
        self.virtual.model.train()
        try:
            with contextlib.closing(self._stream()) as stream:
                batches = TimedBatches(stream, self.memory_format)
                if self.step == 0 and self.logging.sample_images and self.ranks.is_main:
                    self._show_first_images(batches, clock, writer)
                while self.step < total:
                    facts = self._train_step(batches)
                    self._note(facts, progress)
                    evaluates, saves = evaluations.due(self.step), self._saves_after(facts)
                    if saves:
                        facts = self._settle(facts, progress)
                    record: dict[str, Any] = {}
                    if evaluates or logs.due(self.step):
                        record = self._read_interval(clock, batches, progress)
                    clock.pause()
                    if evaluates:
                        record.update(self._evaluate())
                    if record:
                        self._write(record, writer)
                        progress.update(record)
                    self._between_steps(facts, saves, progress)
                    clock.go_on()
        finally:
            self.ranks.whereabouts.enter("checkpoint")
            self._saver.wait()
        clock.pause()
        self._check_saved(progress)

    def _show_first_images(self, batches: TimedBatches, clock: _Clock, writer: MetricsWriter) -> None:
        images, labels = batches.peek()
        clock.pause()
        if self.mix is not None:
            images, _ = self.mix(images, labels, 0, self.virtual.workers_by_pass[0])
        try:
            writer.samples(draw_samples(images[: self.logging.sample_images], self.train.mean, self.train.std))
        except OSError as error:
            self._write_errors["samples.png"] = error
        clock.go_on()

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> StepFacts:
        """One update; returns what all ranks know of the newest step that can be read without a wait."""
        self.virtual.deal = self.dealer.at(self.step)
        result = train_step(
            self.virtual,
            self.optimizer,
            batches,
            step=self.step,
            lr=self.schedule.lr_at(self.step),
            autocast=self.autocast,
            loss_scale=self.loss_scale,
            loss_factor=self.loss_factor * self.schedule.loss_scale,
            loss=self.loss,
            mix=self.mix,
            flags=self._flags(),
            measure_noise=self._measures_noise(),
        )
        overflowed = result.overflowed.any()
        self._interval.add(result.sums, counts=~(result.not_finite | overflowed))
        self._interval.add({"skipped": result.not_finite, "overflowed": overflowed})
        if len(result.arrived):
            dropped = (~result.arrived).sum() * self.execution.workers_per_pass
            self._interval.add({"dropped": dropped}, counts=~(result.not_finite | overflowed))
        self._interval.steps += 1
        facts = self._facts.read(self.step, result)
        self.step += 1
        if self.average:
            self.average.update(self.step)
        self._discard(batches, read=len(result.passes_not_finite))
        self._check_finite(facts)
        return facts

    def _discard(self, batches: Iterator[tuple[Tensor, Tensor]], *, read: int) -> None:
        """After a step that has `read` so many passes: take those from the loader that it was left without."""
        self._passes += read
        for _ in range(read):
            self._unread.popleft()
        while self._unread and self._unread[0] < self.step:
            next(batches)
            self._unread.popleft()

    def _note(self, facts: StepFacts, progress: Progress) -> None:
        """Record the passes that did not arrive, and report an overflow."""
        if facts.absent:
            self.absent[facts.step] = list(facts.absent)
        if facts.overflowed:
            names = [name for name, p in self.virtual.model.named_parameters() if p.requires_grad]
            named = ", ".join(names[i] for i in facts.overflowed[:3])
            more = f" and {len(facts.overflowed) - 3} more" if len(facts.overflowed) > 3 else ""
            progress.note(
                f"warning: step {facts.step}: the gradients of {named}{more} grew faster than the exact sum has room "
                "for; this update is skipped, and the next step has more headroom"
            )

    def _measures_noise(self) -> bool:
        every = self.logging.noise_scale_every_steps
        return every > 0 and self.step % every == 0

    def _settle(self, facts: StepFacts, progress: Progress) -> StepFacts:
        """`facts`, and those of the steps since: what a checkpoint holds must be known to be good."""
        for later in self._facts.rest():
            self._note(later, progress)
            self._check_finite(later)
            facts = replace(later, stop=facts.stop or later.stop, failed=facts.failed or later.failed)
        return facts

    def _flags(self) -> Tensor:
        minutes = self.checkpointing.every_minutes
        due = minutes is not None and time.monotonic() - self._last_save > 60 * minutes
        stop = self.stop_request.asked
        failed = self._saver.error is not None or bool(self._write_errors)
        return flags_on(self.ranks.device, stop=stop, save=due and self.ranks.is_main, failed=failed)

    def _stream(self) -> Batches:
        self._unread.clear()
        return self.train.stream(self._ask(), augment=True)

    def _ask(self) -> Iterator[Pass]:
        """What the loader is asked for: by the deal of each step, but for passes of a step that has ended early."""
        for step in range(self.step, self.schedule.total_steps):
            self._asked = step
            for workers in self.dealer.at(step).workers_of(self.ranks.rank):
                if step >= self.step:
                    self._unread.append(step)
                    yield self._pass(step, workers)

    def passes(self, steps: Iterable[int]) -> Iterator[Pass]:
        """The images of this rank's passes of `steps`, in order, by the deal that holds now."""
        for step in steps:
            for workers in self.virtual.workers_by_pass:
                yield self._pass(step, workers)

    def _pass(self, step: int, workers: range) -> Pass:
        return Pass(self.order.epoch_of(step), self.order.indices(step, workers))

    def _each_epochs(self, epochs: float) -> Cadence:
        every = max(1, round(epochs * self.order.steps_per_epoch)) if epochs else 0
        # Epochs are the recipe's, whose step 0 a resize moves.
        return Cadence(every, self.schedule.total_steps, start=-self.order.recipe_step(0))

    # ---- what happens between steps

    def _read_interval(self, clock: _Clock, batches: TimedBatches, progress: Progress) -> dict[str, float]:
        """The metrics since the last record. Waits for the device."""
        interval, self._interval = self._interval, Interval()
        (loss,), (wrong,) = interval.read("loss"), interval.read("wrong")
        (skipped,), (overflowed,) = interval.read("skipped"), interval.read("overflowed")
        counted = interval.steps - int(skipped + overflowed)
        self.skipped_steps += int(skipped + overflowed)
        dropped = int(sum(interval.read("dropped")))
        dropped_images = dropped * self.order.images_per_worker
        images = counted * self.order.global_batch - dropped_images
        timing = clock.read(batches.waited)
        compute = self._compare_ranks(timing, progress)
        record: dict[str, float] = {
            "step": self.step,
            "epoch": self.order.recipe_step(self.step) / self.order.steps_per_epoch,
            "train/loss": loss / counted if counted else math.nan,
            "train/top1_error": 100.0 * wrong / images if counted else math.nan,
            "lr": self.schedule.lr_at(self.step - 1),
            "global_batch": self.order.global_batch - self.backup_workers * self.order.images_per_worker,
            "images_per_second": (self.order.global_batch - dropped_images / interval.steps) / timing.step,
            "data_wait": timing.data_wait,
            **compute,
            **_noise_record(interval.read("noise")),
        }
        if skipped:
            record["skipped_steps"] = int(skipped)
        if overflowed:
            record["overflowed_steps"] = int(overflowed)
        if dropped:
            record["dropped_workers"] = dropped
        if skipped_images := self._all_skipped_images():
            record["skipped_images"] = skipped_images
        return record

    def _compare_ranks(self, timing: _Timing, progress: Progress) -> dict[str, float]:
        """What the ranks' own compute time says: metrics, a slow one, another deal."""
        pace = gather_pace(
            self.ranks,
            compute=self.virtual.own_compute.read(),
            data_wait=timing.data_wait * timing.steps,
            steps=timing.steps,
            passes=self._passes,
            asked=self._asked,
            seconds=timing.steps * timing.step,
        )
        self._passes = 0
        if self.virtual.gate is not None:
            self.virtual.gate.learn(pace)
        record, straggler = self._stragglers.compare(pace)
        dealt = self.dealer.consider(pace) if pace.asked + 1 < self.schedule.total_steps else None
        for line in filter(None, (straggler, dealt)):
            progress.note(line)
        if dealt:
            record |= {f"deal/rank_{rank}": n for rank, n in enumerate(self.dealer.newest.workers_on_rank())}
        return record

    def _all_skipped_images(self) -> int:
        """Training images that another stood in for, since step 0 and on all ranks, who call this together."""
        return self.skipped_images + sum(self.ranks.gather(self.train.skipped))

    def _saves_after(self, facts: StepFacts) -> bool:
        """Whether a checkpoint is due after the newest step: by steps, epochs, the clock or a stop request."""
        total = self.schedule.total_steps
        epochs = self._each_epochs(self.checkpointing.every_epochs or 0)
        steps = Cadence(self.checkpointing.every_steps or 0, total)
        return epochs.due(self.step) or steps.due(self.step) or facts.save or facts.stop

    def _between_steps(self, facts: StepFacts, saves: bool, progress: Progress) -> None:
        """What all ranks do together where it is due: compare replicas, save, stop."""
        every = self.health.replica_check_every_steps
        if every and (saves or self.step % every == 0):
            self._check_replicas()
        if facts.failed:
            self._check_saved(progress)
        if saves:
            self.ranks.whereabouts.enter("checkpoint")
            self._last_save = time.monotonic()
            skipped_images = self._all_skipped_images()
            if self.ranks.is_main:
                self._saver.save(self.state(skipped_images=skipped_images))
        if facts.stop and self.step < self.schedule.total_steps:
            self._stop(progress)

    def _stop(self, progress: Progress) -> None:
        """Raise Preempted, once the checkpoint of this very step is on the disk; CheckpointError if it is not."""
        newest = self._newest_saved()
        self._check_saved(progress)
        if newest != self.step:
            raise CheckpointError(
                f"stopped by a signal after step {self.step}, whose checkpoint could not be written. "
                f"{_say_newest(newest)} Free some space or fix the folder, then run the same command again"
            )
        raise Preempted(
            f"stopped by a signal after step {self.step}, with a checkpoint; the same command resumes from there"
        )

    def _newest_saved(self) -> int | None:
        """The step of the newest checkpoint, on all ranks: when what is being written is there, or has failed."""
        self._saver.wait()
        return self.ranks.broadcast(self.checkpoints.newest_step() if self.ranks.is_main else None)

    def _write(self, record: dict[str, Any], writer: MetricsWriter) -> None:
        try:
            writer.write(record)
        except OSError as error:  # as with a checkpoint: all ranks learn of it with the next step
            self._write_errors["a record of the metrics"] = error

    def _check_saved(self, progress: Progress) -> None:
        """On all ranks: raise CheckpointError, or warn, if rank 0 could not write a checkpoint or another file."""
        errors = {"a checkpoint": self._saver.take_error(), **self._write_errors}
        self._write_errors = {}
        for what, error in self.ranks.broadcast(errors).items():
            if error is None:
                continue
            seen = f"{what} could not be written ({error}); earlier checkpoints are intact"
            if self.checkpointing.on_error == "stop":
                raise CheckpointError(
                    f"{seen}. Free some space or fix the folder, then run the same command again; "
                    "checkpoint.on_error=continue continues without it"
                )
            progress.note(f"warning: {seen}")

    def _check_replicas(self) -> None:
        average = self.average.state_dict() if self.average else {}
        check_replicas(self.virtual.model, self.optimizer, self.ranks, step=self.step, average=average)

    def _check_finite(self, facts: StepFacts) -> None:
        if not facts.not_finite or self.health.on_not_finite == "skip":
            return
        # A device that computes wrong is the cause sooner than the recipe.
        self._check_replicas()
        dealt = self.dealer.at(facts.step).workers_of(self.ranks.rank)
        # Fewer passes than dealt, if the step ended early.
        own = [w for w, bad in zip(dealt, facts.passes_not_finite, strict=False) if bad]
        everyone = self.ranks.gather([worker for workers in own for worker in workers])
        found = [f"rank {rank}: virtual workers {workers}" for rank, workers in enumerate(everyone) if workers]
        where = "the loss on " + "; ".join(found) if found else "the summed gradients, though every loss is finite"
        raise HealthError(
            f"step {facts.step}: not finite: {where}. The update was not applied (learning rate "
            f"{self.schedule.lr_at(facts.step):g}). {_say_newest(self._newest_saved())} Lower schedule.reference_lr, "
            "warm up longer, look at the images, or skip such steps with health.on_not_finite=skip"
        )

    def _evaluate(self) -> dict[str, Any]:
        """Metrics and digest of the weights, and of their average if there is one."""
        found = self._evaluate_weights()
        if self.average:
            with self.average.in_place():
                found |= self._evaluate_weights("ema_")
        self.last_validation = {key: value for key, value in found.items() if key.startswith("val/")}
        self.recent_top1_errors = [*self.recent_top1_errors, found["val/top1_error"]][-5:]
        return {key: value for key, value in found.items() if key != "val/images"}

    def _evaluate_weights(self, prefix: str = "") -> dict[str, Any]:
        """Of the weights that the model holds now, all names with `prefix`; kept if they are the best."""
        with self.evaluation_statistics():
            found: dict[str, Any] = evaluate(
                self.virtual.model,
                self.validation,
                self.ranks,
                images_per_batch=self.evaluation.images_per_batch,
                autocast=self.autocast,
                memory_format=self.memory_format,
            )
            if prefix:
                found = {key.replace("/", f"/{prefix}"): v for key, v in found.items() if not key.endswith("images")}
            if self.best and self.ranks.is_main:
                try:
                    self.best.offer(found, self.virtual.model, step=self.step)
                except OSError as error:
                    self._write_errors["model_best.pt"] = error
            return found | {f"{prefix}weights_sha256": digest_of(self.virtual.model.state_dict())}

    @contextlib.contextmanager
    def evaluation_statistics(self) -> Iterator[None]:
        """Inside, the model's buffers hold the BatchNorm statistics that evaluation and export use."""
        if not self.precise_steps or not self.virtual.batchnorm.size:
            yield
            return
        batchnorm = self.virtual.batchnorm
        running = batchnorm.read()
        self.virtual.deal = self.dealer.newest  # a step that is replayed may lack passes
        # The images of the newest steps; those before a resize had another minibatch.
        first = max(self.resize.step if self.resize else 0, self.step - self.precise_steps)
        count = self.step - first
        with (
            contextlib.closing(self.train.stream(self.passes(range(first, self.step)), augment=True)) as stream,
            self.autocast(),
        ):
            precise = self.virtual.measure_statistics(TimedBatches(stream, self.memory_format), count)
        batchnorm.write(precise)
        yield
        batchnorm.write(running)

    def evaluated_weights(self) -> dict[str, Tensor]:
        """A copy of the weights that the model holds, with the statistics that evaluation uses."""
        with self.evaluation_statistics():
            return weights_of(self.virtual.model)

    def summary(self) -> dict[str, Any]:
        """`summary.json` of a finished run."""
        dropped = self.execution.workers_per_pass * sum(map(len, self.absent.values()))
        images = self.order.images_consumed(self.step) - dropped * self.order.images_per_worker
        skipped = self.last_validation.get("val/skipped_images", 0)
        skipped_train = self._all_skipped_images()
        return {
            "top1_error": self.last_validation["val/top1_error"],
            "top1_error_median_last5": statistics.median(self.recent_top1_errors),
            **({"ema_top1_error": self.last_validation["val/ema_top1_error"]} if self.average else {}),
            **({"best": self.best.state} if self.best else {}),
            "val_images": int(self.last_validation["val/images"]),
            "steps": self.step,
            "seconds": self.seconds,
            "images_per_second": images / self.train_seconds,
            "world_size": self.ranks.world_size,
            "global_batch": self.order.global_batch - self.backup_workers * self.order.images_per_worker,
            "peak_lr": self.schedule.peak_lr,
            **({"skipped_images": int(skipped)} if skipped else {}),
            **({"skipped_train_images": skipped_train} if skipped_train else {}),
            **({"skipped_steps": self.skipped_steps} if self.skipped_steps else {}),
            **({"dropped_workers": dropped} if dropped else {}),
        }


def _say_newest(step: int | None) -> str:
    return f"The newest checkpoint is of step {step}." if step is not None else "There is no checkpoint yet."


def _noise_record(sums: list[float]) -> dict[str, float]:
    """The gradient noise scale of an interval and its two parts; nothing if it was not measured."""
    noise, squared_norm, steps = sums or (0.0, 0.0, 0.0)
    if not steps:
        return {}
    return {
        # Averaged before they are divided: a single step's |G|² may come out negative.
        "gradient_noise_scale": noise / squared_norm if squared_norm > 0 else math.nan,
        "gradient_noise": noise / steps,
        "gradient_squared_norm": squared_norm / steps,
    }


@dataclass(frozen=True)
class _Timing:
    steps: int
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
        timing = _Timing(steps, self._interval_seconds / steps, (waited - self._waited) / steps)
        self._interval_seconds, self._interval_first_step, self._waited = 0.0, self._trainer.step, waited
        return timing

    def _count(self, now: float) -> None:
        self._interval_seconds += now - self._started
        self._trainer.train_seconds += now - self._started
        self._started = now
