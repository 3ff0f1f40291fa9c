"""The trained model of a run folder, ready to be used."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from largebatch.config import Config
from largebatch.distributed.environment import choose_device, read_launch
from largebatch.errors import UserError
from largebatch.models.build import build
from largebatch.runfolder import Inference, RunFolder
from largebatch.training.precision import make_autocast

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A run's model in evaluation mode, and what goes into it."""

    model: nn.Module
    config: Config
    inference: Inference
    device: torch.device

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """float32 [n, classes] for normalised images [n, C, H, W], computed as the run's evaluation does."""
        channels_last = self.config.execution.channels_last
        images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        with make_autocast(self.config.execution.precision, self.device)():
            return self.model(images).float()

    def probabilities(self, images: Tensor) -> Tensor:
        """float32 [n, classes]; where the loss is binary, of each class by itself, and a row need not add up to 1."""
        logits = self.logits(images)
        independent = self.config.loss.name == "bce" or self.config.data.multi_label
        return logits.sigmoid() if independent else logits.softmax(dim=1)


def load_trained(run_dir: Path, *, which: str, device: str) -> Trained:
    """The model of a run with its weights, or with `which` "ema" or "best" those (see `RunFolder.load_weights`).

    Needs neither the data nor `model.init_from`. Raises UserError if there is no run, or it has no such weights, or in
    one of several processes.
    """
    launch = read_launch()
    if launch.world_size > 1:
        raise UserError(f"predict and export run in one process, and {launch.launcher} started {launch.world_size}")
    folder = RunFolder(run_dir)
    config, inference = folder.read_config([]), folder.inference()
    here = choose_device(device, launch)
    settings = config.model.model_copy(update={"init_from": None})
    model = build(settings, classes=len(inference.class_names), shape=inference.shape, seed=config.seed).to(here)
    if config.execution.channels_last:
        model = model.to(memory_format=torch.channels_last)
    folder.load_weights(model, here, which=which, warn=_log.warning)
    return Trained(model.eval(), config, inference, here)
