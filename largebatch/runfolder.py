"""The folder of a run: its files, who may write in it, and what is left there of an earlier run."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largebatch.config import Config, differences, read_config
from largebatch.configfile.loading import dump_config
from largebatch.data.source import ImageSource
from largebatch.errors import CheckpointError, ConfigError, DataError, UserError
from largebatch.plan import Plan
from largebatch.report.environment import describe_environment
from largebatch.report.files import write_json_atomically, write_text_atomically
from largebatch.report.lock import hold_folder
from largebatch.report.metrics import METRICS_FILE, SAMPLES_FILE, TENSORBOARD_FOLDER, clear_tensorboard
from largebatch.report.per_class import PER_CLASS_FILES
from largebatch.report.plots import CURVES_FILE, draw_curves
from largebatch.training.best import BestWeights, write_weights
from largebatch.training.checkpoint import CheckpointFolder, deserialise, load_tensors
from largebatch.wording import printable

_LONGER = (
    "; a finished schedule cannot be extended, since its learning rates depend on its length: train the longer one in "
    "another folder (--run-dir OTHER), and set schedule.epochs to its whole length"
)


@dataclass(frozen=True)
class Inference:
    """What goes into a run's model and what comes out of it (`inference.json`)."""

    class_names: list[str]
    """Of the outputs, in order."""
    shape: tuple[int, int, int]
    """Channels, height, width."""
    mean: list[float]
    std: list[float]
    """Of each channel, of pixels in [0, 1]."""
    resize_size: int | None
    """Pixels of an image file's short side before the centre crop; None for sets in memory, which are not resized."""


@dataclass(frozen=True)
class Recorded:
    """What a replay takes from the run that it repeats."""

    passes: int
    """Of a step, over all ranks."""
    absent: dict[int, list[int]]
    """Passes that did not arrive, by step."""
    data: dict[str, dict[str, Any]]
    """What it was trained on, by part."""


class RunFolder:
    """Names others rely on: `config.yaml`, `plan.json`, `environment.json`, `inference.json`, `metrics.jsonl`,
    `tensorboard/`, `checkpoints/`, `arrivals.json`, `summary.json`, `curves.png`, `model.pt`, `model_ema.pt` and
    `model_best.pt`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config, self._model = path / "config.yaml", path / "model.pt"
        self._summary, self._inference = path / "summary.json", path / "inference.json"
        self._average, self._best = path / "model_ema.pt", path / "model_best.pt"
        self._checkpoints, self._arrivals = path / "checkpoints", path / "arrivals.json"

    def checkpoints(self, *, keep: int = 1) -> CheckpointFolder:
        return CheckpointFolder(self._checkpoints, keep=keep)

    def best(self, metric: str | None) -> BestWeights | None:
        """What keeps the best weights by `metric`, if any."""
        return BestWeights(self._best, metric) if metric is not None else None

    @property
    def has_checkpoints(self) -> bool:
        # os.path's, because Path's raise where a name is too long, say.
        return os.path.isdir(self._checkpoints) and bool(os.listdir(self._checkpoints))

    def check_is_folder(self) -> None:
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UserError(f"--run-dir: {self.path} is a file; give a folder")
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            name = printable(str(self.path))
            raise UserError(f"--run-dir: {name}: is not UTF-8, which TensorBoard requires; rename it") from None

    def check_config(self, config: Config) -> None:
        """Raise UserError unless what is here was trained with `config`."""
        if not os.path.exists(self._config):
            if self.has_checkpoints:
                raise UserError(
                    f"--run-dir: {self.path} holds checkpoints but no config.yaml; choose another "
                    "folder, or start over with --resume never (which deletes them)"
                )
            return
        changed = differences(read_config(self._config), config)
        if changed:
            longer = any(line.startswith("schedule.epochs:") for line in changed)
            raise ConfigError(
                f"--run-dir: {self.path} holds a run of another config; choose another folder, or start over with "
                "--resume never (which deletes it)"
                + (_LONGER * longer)
                + ":\n"
                + "\n".join(f"  {line}" for line in changed)
            )

    def open(self, stack: contextlib.ExitStack, *, restart: bool) -> dict[str, Any] | None:
        """Create the folder, without an earlier run if `restart`; returns the summary of a finished run.

        No other process trains in it until `stack` is left.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            stack.enter_context(hold_folder(self.path))
            if restart:
                self._clear()
        except OSError as error:
            raise UserError(
                f"--run-dir: {error.filename or self.path}: {error.strerror or error}; give a folder that can be made "
                "and written"
            ) from error
        return self._finished()

    def _clear(self) -> None:
        """Delete the files of an earlier run, and nothing else (config.yaml may be the user's own)."""
        for name in ("plan.json", "environment.json", METRICS_FILE, CURVES_FILE, SAMPLES_FILE, *PER_CLASS_FILES):
            (self.path / name).unlink(missing_ok=True)
        for path in (self._summary, self._model, self._average, self._best, self._inference, self._arrivals):
            path.unlink(missing_ok=True)
        self.checkpoints().clear()
        clear_tensorboard(self.path / TENSORBOARD_FOLDER)

    def _finished(self) -> dict[str, Any] | None:
        """The summary, which is written last, of a run that has come to its end."""
        try:
            summary = json.loads(self._summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not self._model.exists():
            return None
        print(
            f"{self.path} holds this run, already finished; nothing to do (--resume never starts it over)", flush=True
        )
        return summary

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, a file that cannot be written is reported to the user."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"--run-dir: {error.filename or self.path}: {error.strerror}; make room or repair the folder, then "
                "start the same command again"
            ) from error

    def write_start(
        self,
        config: Config,
        plan: Plan,
        sources: tuple[ImageSource, ImageSource],
        data: dict[str, dict[str, Any]],
    ) -> None:
        """What is known before the first step."""
        train, validation = sources
        inference = {
            "model": config.model.model_dump(mode="json"),
            "weights": self._model.name,
            "class_names": list(train.class_names),
            "shape": list(validation.shape),
            "mean": list(train.mean),
            "std": list(train.std),
            "resize_size": validation.resize_size,
            "data": data,
        }
        with self.writing():
            if not self._says(config):  # else it may be the user's own, with comments
                write_text_atomically(self._config, dump_config(config))
            write_json_atomically(self.path / "plan.json", plan.as_dict())
            write_json_atomically(self.path / "environment.json", describe_environment())
            write_json_atomically(self._inference, inference)

    def _says(self, config: Config) -> bool:
        """Whether config.yaml holds `config`; what an earlier run left there may be anything."""
        try:
            return self._config.exists() and read_config(self._config) == config
        except ConfigError:
            return False

    def write_arrivals(self, passes: int, absent: dict[int, list[int]]) -> None:
        """Which of a step's `passes` did not arrive, by step: what `recorded` reads."""
        lines = {step: " ".join(map(str, leaves)) for step, leaves in absent.items()}
        with self.writing():
            write_json_atomically(self._arrivals, {"passes": passes, "absent": lines})

    def write_end(
        self,
        weights: dict[str, torch.Tensor],
        averages: dict[str, torch.Tensor] | None,
        summary: dict[str, Any],
        *,
        warn: Callable[[str], None],
    ) -> None:
        """What is known after the last step; `averages` of the weights, if there are any."""
        with self.writing():
            if averages is not None:
                write_weights(self._average, averages)
            write_weights(self._model, weights)
            draw_curves(self.path, warn)
            write_json_atomically(self._summary, summary)

    def read_config(self, overrides: Sequence[str]) -> Config:
        """The run's config. Raises UserError if there is no run here."""
        if not (os.path.isfile(self._model) or self.has_checkpoints):
            raise UserError(f"{self.path}: no model.pt here, and no checkpoint; give the folder of a run")
        return read_config(self._config, overrides)

    def inference(self) -> Inference:
        """What the run's model takes and gives. Raises DataError where the folder does not say."""
        try:
            found = json.loads(self._inference.read_text(encoding="utf-8"))
            channels, height, width = found["shape"]
            found["shape"] = channels, height, width
            return Inference(**{name: found[name] for name in Inference.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._inference}: missing or damaged ({type(error).__name__}: {error}); the run wrote it when it "
                "started"
            ) from None

    def recorded(self, config: Config) -> Recorded:
        """What arrived in this finished run. Raises UserError if that is not recorded, or if it is not of `config`."""
        try:
            found = json.loads(self._arrivals.read_text(encoding="utf-8"))
            absent = {int(step): [int(leaf) for leaf in leaves.split()] for step, leaves in found["absent"].items()}
            passes = int(found["passes"])
        except OSError as error:
            raise UserError(
                f"--replay: {self._arrivals}: {error.strerror}; give the folder of a finished run that had "
                "batch.deadline (any other is repeated by its config alone)"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"--replay: {self._arrivals}: is damaged; the run cannot be replayed without it") from None
        if changed := differences(read_config(self._config), config):
            raise UserError(f"--replay: not the config of {self.path}: {'; '.join(changed)}")
        return Recorded(passes, absent, self.data())

    def data(self) -> dict[str, dict[str, Any]]:
        """What the run was trained on, by part; empty where the folder does not say."""
        try:
            return json.loads(self._inference.read_text(encoding="utf-8"))["data"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def load_weights(
        self, model: nn.Module, device: torch.device, *, which: str = "model", warn: Callable[[str], None]
    ) -> None:
        """Load `model.pt`, or with `which` "ema" or "best" the average or the best weights, into `model`; of a run that
        is not finished, what its newest checkpoint holds. Raises DataError if they are not of this model, and UserError
        if the run has none of that kind."""
        path = {"model": self._model, "ema": self._average, "best": self._best}[which]
        if os.path.isfile(path):
            with path.open("rb") as file:
                name, weights = str(path), load_tensors(file, device, name=str(path))
        elif which == "best" or os.path.isfile(self._model):
            key = "checkpoint.keep_best" if which == "best" else "ema.decay"
            raise UserError(f"{path}: no such file; the run keeps none without {key}, or before its first evaluation")
        else:
            data = self.checkpoints().newest(warn)
            if data is None:
                raise DataError(f"{self._checkpoints}: no intact checkpoint to evaluate")
            state = deserialise(data, device)
            name, weights = f"the checkpoint of step {state.step}", state.model
            if which == "ema":
                if not state.ema:
                    raise UserError(f"{self.path}: this run keeps no average of its weights (ema.decay)")
                weights = weights | state.ema
            warn(f"the run is not finished: this is {name}")
        try:
            model.load_state_dict(weights)
        except (RuntimeError, TypeError) as error:
            raise DataError(f"{name}: not the weights of this run's model: {error}") from error
