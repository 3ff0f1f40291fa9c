"""From a config to a finished run folder: puts the components together, and lets the trainer run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largebatch.config import Config, differences, read_config
from largebatch.configfile.loading import digest, dump_config
from largebatch.data.catalog import facts
from largebatch.data.load import load
from largebatch.data.source import ImageSource
from largebatch.distributed.environment import Launch, Ranks, connect
from largebatch.distributed.roll_call import name_lost_ranks
from largebatch.errors import CheckpointError, ConfigError, DataError, UserError
from largebatch.models.build import build
from largebatch.models.compiled import compile_regions
from largebatch.plan import Plan, describe, make_order, make_plan, run_schedule
from largebatch.recipe.batch import deal_equally
from largebatch.recipe.resize import Resize
from largebatch.report.environment import code_digest, describe_environment
from largebatch.report.files import write_bytes_atomically, write_json_atomically, write_text_atomically
from largebatch.report.lock import hold_folder
from largebatch.report.metrics import TENSORBOARD_FOLDER, MetricsWriter, open_writers
from largebatch.report.plots import draw_curves
from largebatch.report.progress import open_progress
from largebatch.resume import describe_resize, go_on
from largebatch.training.checkpoint import CheckpointFolder, deserialise, load_tensors
from largebatch.training.evaluation import evaluate
from largebatch.training.optimizer import make_optimizer
from largebatch.training.precision import make_autocast, slow_precision
from largebatch.training.preemption import StopRequest, stop_on_signals
from largebatch.training.trainer import Trainer
from largebatch.training.virtual_workers import VirtualWorkers

_OWN_FILES = (
    "plan.json",
    "environment.json",
    "metrics.jsonl",
    "summary.json",
    "curves.png",
    "model.pt",
    "config.yaml",
)
_CHECKPOINTS = "checkpoints"


def train(config: Config, run_dir: Path, *, name: str, resume: str, launch: Launch) -> dict[str, Any]:
    """Train `config` in `run_dir`, on as many ranks as `launch` says; returns the summary.

    `resume` "auto" goes on from what the folder holds; "never" starts anew. Raises UserError for bad input,
    before any process group exists where it can be told without the others, and HealthError.
    """
    _check_before_start(config, run_dir, resume, launch)
    agent = os.getppid() if launch.launcher == "torchrun" else None
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(
            connect(
                launch,
                device=config.execution.device,
                backend=config.execution.backend,
                threads=config.execution.threads,
                timeout_seconds=60 * config.execution.timeout_minutes,
            )
        )
        # From here on: a signal ends a process that still waits for the others.
        stop_request = stack.enter_context(stop_on_signals(launcher=agent))
        stack.enter_context(name_lost_ranks(ranks))
        check_alike(
            {"config": digest(config), "code of largebatch": code_digest(), "version of torch": torch.__version__},
            ranks,
        )
        finished = ranks.from_main(lambda: _open_folder(run_dir, resume, stack))
        return finished or _train_connected(config, run_dir, name, ranks, stop_request)


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


def _check_before_start(config: Config, run_dir: Path, resume: str, launch: Launch) -> None:
    """Every error that can be found without data, device or the other ranks."""
    known = facts(config.data)
    if known is not None:
        make_order(config, known.train_images)
    # os.path's, because Path's raise where a name is too long, say.
    if os.path.exists(run_dir) and not os.path.isdir(run_dir):
        raise UserError(f"--run-dir: {run_dir} is a file; give a folder")
    if resume == "auto":
        _check_same_config(config, run_dir)
    if resume == "never" or not _has_checkpoints(run_dir):  # else k may have been rescaled
        deal_equally(config.batch.virtual_workers, config.execution.workers_per_pass, launch.world_size)


def _has_checkpoints(run_dir: Path) -> bool:
    checkpoints = run_dir / _CHECKPOINTS
    return os.path.isdir(checkpoints) and bool(os.listdir(checkpoints))


def _check_same_config(config: Config, run_dir: Path) -> None:
    """Raise UserError unless what `run_dir` holds was trained with `config`."""
    saved = run_dir / "config.yaml"
    if not os.path.exists(saved):
        if _has_checkpoints(run_dir):
            raise UserError(
                f"--run-dir: {run_dir} holds checkpoints but no config.yaml that says of what; choose another folder, "
                "or start anew with --resume never (which deletes them)"
            )
        return
    changed = differences(read_config(saved), config)
    if changed:
        raise ConfigError(
            f"--run-dir: {run_dir} holds a run of another config; choose another folder, or start anew with "
            "--resume never (which deletes it):\n" + "\n".join(f"  {line}" for line in changed)
        )


def _open_folder(run_dir: Path, resume: str, stack: contextlib.ExitStack) -> dict[str, Any] | None:
    """Make the run folder, emptied of an earlier run if `resume` is "never"; the summary of a finished run.

    No other process trains in it until `stack` is left.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
        stack.enter_context(hold_folder(run_dir))
        if resume == "never":
            _clear(run_dir)
    except OSError as error:
        raise UserError(
            f"--run-dir: {error.filename}: {error.strerror}; give a folder that can be made and written"
        ) from error
    return _finished(run_dir)


def _finished(run_dir: Path) -> dict[str, Any] | None:
    """The summary, which is written last, of a run that has come to its end."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not (run_dir / "model.pt").exists():
        return None
    print(f"{run_dir} holds this run, finished; nothing is left to do (--resume never starts it anew)", flush=True)
    return summary


def _clear(run_dir: Path) -> None:
    """Delete the files of an earlier run, and nothing else."""
    for name in _OWN_FILES:
        (run_dir / name).unlink(missing_ok=True)
    CheckpointFolder(run_dir / _CHECKPOINTS, keep=1).clear()
    for events in (run_dir / TENSORBOARD_FOLDER).glob("events.out.tfevents.*"):
        events.unlink()


def _train_connected(
    config: Config, run_dir: Path, name: str, ranks: Ranks, stop_request: StopRequest
) -> dict[str, Any]:
    sources = load(config.data, seed=config.seed, device=ranks.device)
    train, validation = (source.fingerprint() for source in sources)
    check_alike({"training set": train, "validation set": validation}, ranks)
    checkpoints = CheckpointFolder(run_dir / _CHECKPOINTS, keep=config.checkpoint.keep)
    data = ranks.broadcast(checkpoints.newest(_warn) if ranks.is_main else None)
    state = None if data is None else deserialise(data, ranks.device)
    images = sources[0].images
    current, resize = go_on(config, state, world_size=ranks.world_size, train_images=images)
    plan = make_plan(
        current,
        name=name,
        world_size=ranks.world_size,
        train_images=images,
        val_images=sources[1].images,
        resize=resize,
    )
    trainer = make_trainer(current, plan, ranks, sources, checkpoints, resize)
    trainer.stop_request = stop_request
    if state is not None:
        trainer.restore(state)
    first_step = trainer.step + 1 if data is not None else 0
    ranks.from_main(lambda: _write_start(config, plan, run_dir))
    total, done = trainer.schedule.total_steps, trainer.step
    writer = _open_writer(run_dir, ranks, first_step)
    try:
        with open_progress(is_main=ranks.is_main, total_steps=total, steps_done=done) as progress:
            progress.note(describe(plan))
            slow = slow_precision(config.execution.precision, ranks.device)
            if slow:
                progress.note(f"warning: {slow}")
            if done:
                progress.note(f"going on from step {done} of {total}")
            if state is not None and trainer.resize is not None and done == trainer.resize.step:
                progress.note(describe_resize(state, plan, trainer.resize))
            trainer.run(writer, progress)
    finally:
        with contextlib.suppress(OSError):  # told already, by the write that failed
            writer.close()
    return _finish(trainer, run_dir, ranks)


def _open_writer(run_dir: Path, ranks: Ranks, first_step: int) -> MetricsWriter:
    """What takes this rank's records; what goes wrong with the files is raised on all ranks."""
    opened: list[MetricsWriter] = []

    def open_files() -> None:
        with _writing(run_dir):
            opened.append(open_writers(run_dir, is_main=True, first_step=first_step))

    ranks.from_main(open_files)
    return opened[0] if opened else open_writers(run_dir, is_main=False, first_step=first_step)


def _warn(text: str) -> None:
    print(f"warning: {text}", flush=True)


@contextlib.contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    """Inside, a file that cannot be written is told to the user."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"--run-dir: {error.filename or run_dir}: {error.strerror}; make room or mend the folder, then start the "
            "same command again"
        ) from error


def _write_start(config: Config, plan: Plan, run_dir: Path) -> None:
    with _writing(run_dir):
        write_text_atomically(run_dir / "config.yaml", dump_config(config))
        write_json_atomically(run_dir / "plan.json", plan.as_dict())
        write_json_atomically(run_dir / "environment.json", describe_environment())


def build_model(config: Config, source: ImageSource, ranks: Ranks) -> nn.Module:
    """The config's model on this rank's device, initialised alike on all ranks."""
    model = build(config.model, classes=source.classes, shape=source.shape, seed=config.seed).to(ranks.device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.name: {config.model.name!r} has no parameters to train")
    if config.execution.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.execution.compile:
        compile_regions(model)
    return model


def make_trainer(
    config: Config,
    plan: Plan,
    ranks: Ranks,
    sources: tuple[ImageSource, ImageSource],
    checkpoints: CheckpointFolder,
    resize: Resize | None = None,
) -> Trainer:
    """The trainer of `config`, at step 0; `config` has the k that `resize` says."""
    execution = config.execution
    train_source, validation = sources
    model = build_model(config, train_source, ranks)
    optimizer = make_optimizer(
        model, config.optimizer, fused=execution.precision == "fp16" or ranks.device.type == "cuda"
    )
    virtual = VirtualWorkers(
        model,
        ranks,
        virtual_workers=config.batch.virtual_workers,
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
    )
    order = make_order(config, train_source.images, resize)
    return Trainer(
        virtual=virtual,
        optimizer=optimizer,
        schedule=run_schedule(config, order, resize),
        order=order,
        train=train_source,
        validation=validation,
        ranks=ranks,
        execution=execution,
        evaluation=config.evaluation,
        checkpointing=config.checkpoint,
        health=config.health,
        logging=config.logging,
        checkpoints=checkpoints,
        resize=resize,
        loss_factor=config.batch.virtual_workers if config.batch.loss_mean_over == "images_per_worker" else 1.0,
        precise_steps=config.batchnorm.precise_steps if config.batchnorm.statistics == "precise" else 0,
    )


def _finish(trainer: Trainer, run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Write `model.pt`, `summary.json` and `curves.png` of a run that has come to its end."""
    with trainer.evaluation_statistics():
        # A copy: the statistics that evaluation used are in the buffers here only.
        weights = {
            key: value.detach().to("cpu", copy=True).contiguous()
            for key, value in trainer.virtual.model.state_dict().items()
        }
    summary = trainer.summary()
    ranks.from_main(lambda: _write_end(weights, summary, run_dir))
    return summary


def _write_end(weights: dict[str, torch.Tensor], summary: dict[str, Any], run_dir: Path) -> None:
    with _writing(run_dir):
        buffer = io.BytesIO()  # torch's own writer has its own errors for a disk that is full
        torch.save(weights, buffer)
        write_bytes_atomically(run_dir / "model.pt", buffer.getvalue())
        draw_curves(run_dir)
        write_json_atomically(run_dir / "summary.json", summary)


def evaluate_run(run_dir: Path, launch: Launch) -> dict[str, float]:
    """Evaluate a finished run's `model.pt` as the run itself did. Raises UserError if there is none."""
    if not os.path.isfile(run_dir / "model.pt"):
        raise UserError(
            f"{run_dir}: no model.pt here; give the folder of a run that has finished (the command that started a run "
            "goes on with it)"
        )
    config = read_config(run_dir / "config.yaml")
    execution = config.execution
    with (
        connect(
            launch,
            device=execution.device,
            backend=execution.backend,
            threads=execution.threads,
            timeout_seconds=60 * execution.timeout_minutes,
        ) as ranks,
        name_lost_ranks(ranks),
    ):
        _, validation = load(config.data, seed=config.seed, device=ranks.device)
        model = build_model(config, validation, ranks)
        _load_weights(model, run_dir / "model.pt", ranks.device)
        return evaluate(
            model,
            validation,
            ranks,
            images_per_batch=config.evaluation.images_per_batch,
            autocast=make_autocast(execution.precision, ranks.device),
            memory_format=torch.channels_last if execution.channels_last else torch.contiguous_format,
        )


def _load_weights(model: nn.Module, path: Path, device: torch.device) -> None:
    with path.open("rb") as file:
        weights = load_tensors(file, device, name=str(path))
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise DataError(f"{path}: not the weights of this run's model: {error}") from error
