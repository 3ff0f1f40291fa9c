"""From a config to a finished run folder: puts the components together, and lets the trainer run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largebatch.config import Config
from largebatch.configfile.loading import digest
from largebatch.data.catalog import known_set
from largebatch.data.load import load
from largebatch.data.mixing import Mixing
from largebatch.data.own import PARTS
from largebatch.data.source import ImageSource
from largebatch.data.source import describe as describe_data
from largebatch.distributed.counter import StepCounter
from largebatch.distributed.environment import Launch, Ranks, connect
from largebatch.distributed.kernels import allow_tf32, describe_device
from largebatch.distributed.roll_call import name_lost_ranks
from largebatch.errors import HealthError, UserError
from largebatch.models.build import build
from largebatch.models.check import check_forward
from largebatch.models.compiled import compile_regions
from largebatch.plan import Plan, describe, make_order, make_plan
from largebatch.recipe.batch import deal_equally
from largebatch.report.environment import code_digest
from largebatch.report.metrics import MetricsWriter, open_writers
from largebatch.report.progress import open_progress
from largebatch.resume import check_data, describe_resize, resume_config
from largebatch.runfolder import Recorded, RunFolder
from largebatch.training.averaging import WeightAverage
from largebatch.training.checkpoint import CheckpointFolder, deserialise
from largebatch.training.dealing import ReplayedDeals
from largebatch.training.delays import Delays
from largebatch.training.gates import Deadline, Enough
from largebatch.training.loss import make_loss
from largebatch.training.optimizer import make_optimizer
from largebatch.training.precision import make_autocast, slow_precision
from largebatch.training.preemption import StopRequest, stop_on_signals
from largebatch.training.replicas import digest_of
from largebatch.training.settings import ExecutionSettings
from largebatch.training.trainer import Trainer
from largebatch.training.virtual_workers import VirtualWorkers


def train(
    config: Config, run_dir: Path, *, name: str, resume: str, launch: Launch, replay: Path | None = None
) -> dict[str, Any]:
    """Train `config` in `run_dir`, on as many ranks as `launch` says; returns the summary.

    `resume` "auto" resumes from the folder; "never" starts over. With `replay`, the folder of a finished run
    of the same config, each step is made of the workers that arrived in it there. Raises UserError for bad input,
    before any process group exists if no other rank is needed to detect it, and HealthError.
    """
    folder = RunFolder(run_dir)
    recorded = RunFolder(replay).recorded(config) if replay is not None else None
    _check_before_start(config.for_ranks(launch.world_size), folder, resume, launch, recorded)
    agent = os.getppid() if launch.launcher == "torchrun" else None
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(connect_ranks(config.execution, launch))
        # From here on: a signal ends a process that still waits for the others.
        stop_request = stack.enter_context(stop_on_signals(launcher=agent))
        stack.enter_context(name_lost_ranks(ranks))
        check_alike(
            {"config": digest(config), "code of largebatch": code_digest(), "version of torch": torch.__version__},
            ranks,
        )
        finished = ranks.from_main(lambda: folder.open(stack, restart=resume == "never"))
        return _followed_recipe(finished or _train_connected(config, folder, name, ranks, stop_request, recorded))


def connect_ranks(
    execution: ExecutionSettings, launch: Launch, *, group_of_one: bool = False
) -> contextlib.AbstractContextManager[Ranks]:
    """The ranks of `launch`, as a context, as a config's `execution` wants them (see `connect`)."""
    return connect(
        launch,
        device=execution.device,
        backend=execution.backend,
        threads=execution.threads,
        timeout_seconds=60 * execution.timeout_minutes,
        group_of_one=group_of_one,
    )


def check_alike(own: dict[str, str], ranks: Ranks) -> None:
    """Raise UserError, on all ranks, unless what this rank has is what all of them have: `own`, from what it is to a
    hash of it."""
    everyone = ranks.gather(own)
    for what, value in everyone[0].items():
        odd = [rank for rank, theirs in enumerate(everyone) if theirs[what] != value]
        if odd:
            raise UserError(
                f"the {what} on rank {', '.join(map(str, odd))} is not that of rank 0; start all ranks from the same "
                "files, or with the same overrides"
            )


def _check_before_start(
    config: Config, folder: RunFolder, resume: str, launch: Launch, recorded: Recorded | None
) -> None:
    """Every error that can be found without data, device or the other ranks."""
    known = known_set(config.data)
    if known is not None:
        make_order(config, known.train_images)
    folder.check_is_folder()
    if resume == "auto":
        folder.check_config(config)
    if resume == "never" or not folder.has_checkpoints:  # else k may have been rescaled
        deal = deal_equally(config.batch.dealt_workers, config.execution.workers_per_pass, launch.world_size)
        if recorded is not None:
            ReplayedDeals(deal, recorded.passes, recorded.absent)


def _load_alike(config: Config, ranks: Ranks) -> tuple[tuple[ImageSource, ImageSource], dict[str, dict[str, Any]]]:
    """The data, and what tells them from others; the same on all ranks, or a UserError."""
    sources = load(config.data, seed=config.seed, device=ranks.device)
    seen = {part: describe_data(source) for part, source in zip(PARTS, sources, strict=True)}
    check_alike({part: found["fingerprint"] for part, found in seen.items()}, ranks)
    return sources, seen


def _train_connected(
    config: Config,
    folder: RunFolder,
    name: str,
    ranks: Ranks,
    stop_request: StopRequest,
    recorded: Recorded | None,
) -> dict[str, Any]:
    allow_tf32(config.execution.tf32)
    sources, seen = _load_alike(config, ranks)
    if recorded is not None and config.data.on_change == "refuse":
        check_data(recorded.data, seen)
    checkpoints = folder.checkpoints(keep=config.checkpoint.keep)
    data = ranks.broadcast(checkpoints.newest(_warn) if ranks.is_main else None)
    state = None if data is None else deserialise(data, ranks.device)
    images = sources[0].images
    resolved = config.for_ranks(ranks.world_size)
    current, resize = resume_config(resolved, state, world_size=ranks.world_size, train_images=images, data=seen)
    plan = make_plan(
        current,
        name=name,
        world_size=ranks.world_size,
        train_images=images,
        val_images=sources[1].images,
        resize=resize,
    )
    notes: list[str] = []
    trainer = make_trainer(current, plan, ranks, sources, checkpoints, notes.append, restored=state is not None)
    if recorded is not None:
        trainer.replay(recorded.passes, recorded.absent)
    trainer.stop_request, trainer.data = stop_request, seen
    trainer.best = folder.best(config.checkpoint.keep_best)
    trainer.devices = sorted(set(ranks.gather(describe_device(ranks.device))))
    if state is not None:
        trainer.restore(state)
    first_step = trainer.step + 1 if data is not None else 0
    ranks.from_main(lambda: folder.write_start(config, plan, sources, seen))
    total, done = trainer.schedule.total_steps, trainer.step
    writer = _open_writer(folder, config, ranks, first_step)
    try:
        with open_progress(is_main=ranks.is_main, total_steps=total, steps_done=done) as progress:
            progress.note("\n".join([describe(plan), *([] if done else notes)]))
            slow = slow_precision(config.execution.precision, ranks.device)
            if slow:
                progress.note(f"warning: {slow}")
            if len(trainer.devices) > 1:
                progress.note(
                    f"warning: the ranks compute on different devices ({'; '.join(trainer.devices)}): the result may "
                    "differ in its last bits from that of equal ones, and depends on which rank has which"
                )
            if done:
                progress.note(f"resuming from step {done} of {total}")
            if state is not None and state.devices != trainer.devices:
                progress.note(
                    f"warning: resumed on {'; '.join(trainer.devices)}, after {'; '.join(state.devices)}: the last "
                    "bits may differ from those of an uninterrupted run"
                )
            if current.batch.virtual_workers != resolved.batch.virtual_workers and resize is None:
                progress.note(
                    f"k stays {current.batch.virtual_workers}, as before the stop, though batch.workers_per_rank would "
                    f"make it {resolved.batch.virtual_workers} on {ranks.world_size} ranks (batch.on_resize: keep)"
                )
            if state is not None and trainer.resize is not None and done == trainer.resize.step:
                progress.note(describe_resize(state, plan, trainer.resize))
            trainer.run(writer, progress)
    finally:
        with contextlib.suppress(OSError):  # already reported by the write that failed
            writer.close()
    return _finish(trainer, folder, ranks)


def _open_writer(folder: RunFolder, config: Config, ranks: Ranks, first_step: int) -> MetricsWriter:
    """What takes this rank's records; what goes wrong with the files is raised on all ranks."""
    opened: list[MetricsWriter] = []

    def open_files() -> None:
        with folder.writing():
            own, values = config.logging.writers, config.model_dump(mode="json")
            opened.append(open_writers(folder.path, is_main=True, first_step=first_step, own=own, config=values))

    ranks.from_main(open_files)
    return opened[0] if opened else open_writers(folder.path, is_main=False, first_step=first_step)


def _warn(text: str) -> None:
    print(f"warning: {text}", flush=True)


def build_model(
    config: Config,
    source: ImageSource,
    ranks: Ranks,
    note: Callable[[str], None] | None = None,
    *,
    restored: bool = False,
) -> nn.Module:
    """The config's model on this rank's device, initialised alike on all ranks, after one forward and backward that
    show whether it can be trained; `note` is given lines that say how its weights start. If they are to be `restored`,
    `model.init_from` is not read."""
    settings = config.model.model_copy(update={"init_from": None}) if restored else config.model
    model = build(settings, classes=source.classes, shape=source.shape, seed=config.seed, note=note)
    model = model.to(ranks.device)
    if config.execution.channels_last:
        model = model.to(memory_format=torch.channels_last)
    together = config.batch.images_per_worker
    if config.batchnorm.over == "pass":
        together *= config.execution.workers_per_pass
    for shape in [source.shape, *((source.shape[0], size, size) for size in config.data.other_sizes)]:
        images = torch.randn(min(2, together), *shape, generator=torch.Generator().manual_seed(0))
        check_forward(
            model,
            config.model.name,
            classes=source.classes,
            images=images.to(ranks.device),
            autocast=make_autocast(config.execution.precision, ranks.device),
        )
    if config.execution.compile:
        compile_regions(model)
    return model


def make_trainer(
    config: Config,
    plan: Plan,
    ranks: Ranks,
    sources: tuple[ImageSource, ImageSource],
    checkpoints: CheckpointFolder,
    note: Callable[[str], None] | None = None,
    *,
    restored: bool = False,
) -> Trainer:
    """The trainer of `config`, at step 0; `config` has the k of `plan`."""
    execution, how = config.execution, config.data.augmentation
    train_source, validation = sources
    model = build_model(config, train_source, ranks, note, restored=restored)
    optimizer = make_optimizer(
        model, config.optimizer, fused=execution.precision == "fp16" or ranks.device.type == "cuda"
    )
    virtual = VirtualWorkers(
        model,
        ranks,
        virtual_workers=config.batch.dealt_workers,
        workers_per_pass=execution.workers_per_pass,
        reduction=execution.reduction,
        batchnorm_momentum=config.batchnorm.momentum,
        batchnorm_over=config.batchnorm.over,
        noise_images=plan.global_batch if config.logging.noise_scale_every_steps else 0,
        bucket_mb=execution.bucket_mb,
        static_graph=execution.static_graph,
        gradient_as_bucket_view=execution.gradient_as_bucket_view,
        compression=execution.compression,
        seed=config.seed,
        drops=config.batch.drops,
    )
    if execution.delays.seconds:
        virtual.delays = Delays(execution.delays, ranks.rank)
    if config.batch.deadline is not None:
        virtual.gate = Deadline(config.batch.deadline)
    elif config.batch.backup_workers:
        virtual.gate = Enough(config.batch.virtual_workers // execution.workers_per_pass, StepCounter(ranks))
    loss = make_loss(
        config.loss,
        classes=train_source.classes,
        images=config.batch.images_per_worker * execution.workers_per_pass,
        soft=how.mixes or config.data.multi_label,
        device=ranks.device,
    )
    return Trainer(
        virtual=virtual,
        optimizer=optimizer,
        schedule=plan.schedule,
        order=plan.order,
        train=train_source,
        validation=validation,
        ranks=ranks,
        execution=execution,
        evaluation=config.evaluation,
        checkpointing=config.checkpoint,
        health=config.health,
        logging=config.logging,
        checkpoints=checkpoints,
        resize=plan.resize,
        average=WeightAverage(model, config.ema) if config.ema.decay is not None else None,
        loss_factor=config.batch.virtual_workers if config.batch.loss_mean_over == "images_per_worker" else 1.0,
        loss=loss,
        mix=Mixing(how, classes=train_source.classes, seed=config.seed) if how.mixes else None,
        backup_workers=config.batch.backup_workers,
        precise_steps=config.batchnorm.precise_steps if config.batchnorm.statistics == "precise" else 0,
    )


def unsaved_trainer(config: Config, ranks: Ranks, sources: tuple[ImageSource, ImageSource]) -> Trainer:
    """A trainer in training mode at step 0 whose steps are measured or compared, and never saved."""
    train, validation = sources
    plan = make_plan(
        config,
        name="unsaved",
        world_size=ranks.world_size,
        train_images=train.images,
        val_images=validation.images,
    )
    trainer = make_trainer(config, plan, ranks, sources, CheckpointFolder(Path("unused"), keep=1))
    trainer.virtual.model.train()
    return trainer


def _finish(trainer: Trainer, folder: RunFolder, ranks: Ranks) -> dict[str, Any]:
    """Write `model.pt`, `summary.json` and `curves.png` of a run that has come to its end."""
    weights, averages = trainer.evaluated_weights(), None
    summary = trainer.summary() | {"weights_sha256": digest_of(weights)}
    if trainer.average:
        with trainer.average.in_place():
            averages = trainer.evaluated_weights()
        summary["ema_weights_sha256"] = digest_of(averages)
    if trainer.virtual.drops:
        ranks.from_main(lambda: folder.write_arrivals(trainer.virtual.deal.leaves, trainer.absent))
    ranks.from_main(lambda: folder.write_end(weights, averages, summary, warn=_warn))
    return summary


def _followed_recipe(summary: dict[str, Any]) -> dict[str, Any]:
    """`summary`, unless more than half of the updates were skipped, also in an earlier process: HealthError."""
    skipped, steps = summary.get("skipped_steps", 0), summary.get("steps", 0)
    if 2 * skipped > steps:
        raise HealthError(
            f"{skipped} of {steps} updates were skipped, since they were not finite: this run has not followed its "
            "recipe. Lower schedule.reference_lr, warm up longer, or look at the images"
        )
    return summary
