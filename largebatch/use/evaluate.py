"""`largebatch evaluate`: a run's error again, by class if wanted, on its own validation set or on another one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from largebatch.config import Config
from largebatch.data.load import load, load_folder
from largebatch.data.own import PARTS
from largebatch.data.source import ImageSource
from largebatch.data.source import describe as describe_data
from largebatch.distributed.environment import Launch
from largebatch.distributed.kernels import allow_tf32
from largebatch.distributed.roll_call import name_lost_ranks
from largebatch.errors import UserError
from largebatch.resume import check_data
from largebatch.run import build_model, connect_ranks
from largebatch.runfolder import RunFolder
from largebatch.training.evaluation import evaluate
from largebatch.training.precision import make_autocast

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; the same on all ranks."""

    metrics: dict[str, float]
    """See `largebatch.training.evaluation.evaluate`."""
    confusion: Tensor
    """int64 [classes, classes]: images by true and by predicted class."""
    class_names: tuple[str, ...]


def evaluate_run(
    run_dir: Path, overrides: Sequence[str], launch: Launch, *, which: str = "model", on: Path | None = None
) -> Evaluation:
    """Evaluate a run's `model.pt`, or the newest checkpoint of an unfinished one, as the run itself did.

    `overrides` may change what does not belong to the training: data, execution and evaluation (files that have moved,
    another device). `which` "ema" or "best" takes other weights; `on` is a folder of other images, ``CLASS/*.jpg``.
    Raises UserError if there is nothing to evaluate, or if the data are not those of the run.
    """
    folder = RunFolder(run_dir)
    for override in overrides:
        if override.partition(".")[0] not in ("data", "execution", "evaluation"):
            raise UserError(
                f"{override}: evaluate accepts overrides of data, execution and evaluation; the run fixes the rest"
            )
    config = folder.read_config(overrides)
    execution = config.execution
    with connect_ranks(execution, launch) as ranks, name_lost_ranks(ranks):
        source = _source(folder, config, on, ranks.device)
        allow_tf32(execution.tf32)
        model = build_model(config, source, ranks, restored=True)
        folder.load_weights(model, ranks.device, which=which, warn=_log.warning if ranks.is_main else _log.debug)
        confusion = torch.zeros(source.classes, source.classes, dtype=torch.int64, device=ranks.device)
        metrics = evaluate(
            model,
            source,
            ranks,
            images_per_batch=config.evaluation.images_per_batch,
            autocast=make_autocast(execution.precision, ranks.device),
            memory_format=torch.channels_last if execution.channels_last else torch.contiguous_format,
            confusion=confusion,
        )
        return Evaluation(metrics, confusion.cpu(), source.class_names)


def _source(folder: RunFolder, config: Config, on: Path | None, device: torch.device) -> ImageSource:
    if on is None:
        _, validation = load(config.data, seed=config.seed, device=device)
        if config.data.on_change == "refuse":
            check_data(folder.data(), {PARTS[1]: describe_data(validation)})
        return validation
    inference = folder.inference()
    if inference.resize_size is None:
        raise UserError(
            f"--on: this run's images ({config.data.name}) are not read from files; give another set by overrides, as "
            "data.name=my_module:function data.on_change=accept"
        )
    if config.data.multi_label:
        raise UserError("--on: this run's images have any number of classes (data.multi_label); a folder gives one")
    normalisation = (inference.mean, inference.std)
    return load_folder(config.data, on, inference.class_names, normalisation, seed=config.seed, device=device)
