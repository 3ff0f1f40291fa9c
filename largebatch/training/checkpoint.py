"""Checkpoints: atomic, verified by checksum, never unpickled beyond tensors and plain values (contract 9)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from largebatch.errors import DataError
from largebatch.report.files import write_json_atomically

FORMAT = 5
_NAME = re.compile(r"step_(\d{8,})\.(?:pt|json)")


@dataclass
class TrainState:
    """Everything that a training is, between two steps: what a checkpoint holds."""

    step: int
    """Updates done."""
    images_consumed: int
    order_fingerprint: str
    """Hash of the shuffle of the epoch that `step` stands in."""
    data: dict[str, dict[str, Any]]
    """What it was trained on (`largebatch.data.source.describe`), by part."""
    devices: list[str]
    """What the ranks computed on."""
    skipped_steps: int
    """Updates left out so far."""
    skipped_images: int
    """Training images that another stood in for so far."""
    absent: dict[int, list[int]]
    """Passes that did not arrive, by step, where there were any (`batch.deadline`)."""
    virtual_workers: int
    """k of the newest step."""
    world_size: int
    """Ranks that trained up to here."""
    resize: dict[str, Any] | None
    """The newest change of the minibatch, if any (`largebatch.recipe.resize.Resize`)."""
    model: dict[str, Any]
    optimizer: dict[str, Any]
    ema: dict[str, Any]
    """The average of the weights by name; empty without one."""
    loss_scale: dict[str, Any]
    """Of fp16; empty otherwise."""
    reduction: dict[str, Any]
    """What the sum of the gradients carries from step to step."""
    interval: dict[str, Any]
    """Sums since the last metrics record."""
    recent_top1_errors: list[float]
    """Validation errors of the last epochs, newest last."""
    last_validation: dict[str, float]
    """Metrics of the newest evaluation."""
    best: dict[str, Any]
    """What `checkpoint.keep_best` keeps (`largebatch.training.best`); empty without it."""
    seconds: float
    """Time so far, over all restarts."""
    train_seconds: float
    """The same without evaluations and checkpoints."""


def serialise(state: TrainState) -> bytes:
    """`state` as bytes that `deserialise` reads."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **_shallow(state)}, buffer)
    return buffer.getvalue()


def deserialise(data: bytes, device: torch.device) -> TrainState:
    """The inverse of `serialise`, tensors on `device`; loads tensors and plain values only.

    Raises DataError where the bytes are whole, but not what this version writes.
    """
    loaded = load_tensors(io.BytesIO(data), device, name="the newest checkpoint")
    fields = {"format"} | TrainState.__dataclass_fields__.keys()
    if not isinstance(loaded, dict) or loaded.keys() != fields or loaded.pop("format") != FORMAT:
        raise DataError(
            f"the newest checkpoint is not of format {FORMAT}, so another version wrote it; resume with that version, "
            "or start over with --resume never"
        )
    return TrainState(**loaded)


def load_tensors(file: BinaryIO, device: torch.device, *, name: str) -> Any:
    """What torch.save wrote to `file`, if it is tensors and plain values: nothing else is ever unpickled.

    Raises DataError, which calls the file `name`, for anything else.
    """
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise DataError(
            f"{name}: damaged, or holds more than tensors and plain values, and is not loaded ({type(error).__name__})"
        ) from error


def _shallow(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in state.__dataclass_fields__}


@dataclass(frozen=True)
class _Manifest:
    """The file next to each checkpoint: a checkpoint counts only with a matching manifest."""

    step: int
    size: int
    sha256: str


class CheckpointFolder:
    """The checkpoints of a run, ``step_00000123.pt`` each with its manifest ``step_00000123.json``."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, step: int, data: bytes) -> Path:
        """Write `data` as the checkpoint of `step`, then drop all but the newest `keep` up to it.

        The data come first and the manifest last, each by rename, so that a kill at any moment leaves either
        an intact checkpoint or none, and never touches earlier ones.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        manifest = _Manifest(step, len(data), hashlib.sha256(data).hexdigest())
        write_json_atomically(path.with_suffix(".json"), asdict(manifest))
        # A later step's is one that was damaged, and skipped when the run resumed from an earlier one; one that is not
        # complete would take the place of one to fall back to.
        steps = self._steps()
        kept = [saved for saved in steps if saved <= step and self._is_complete(saved)][-self._keep :]
        self._remove([saved for saved in steps if saved not in kept])
        return path

    def newest(self, warn: Callable[[str], None]) -> bytes | None:
        """The newest intact checkpoint, or None; damaged ones are skipped and reported to `warn`."""
        steps = self._steps()
        for step in reversed(steps):
            try:
                return _verified(self._path(step), step)
            except (OSError, ValueError, TypeError) as error:
                why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
                warn(f"checkpoint {self._path(step)} is damaged and skipped ({why})")
        if steps:
            warn("no checkpoint is intact; the run starts over from step 0")
        return None

    def newest_step(self) -> int | None:
        """The step of the newest complete checkpoint, its checksum not verified; None if there is none."""
        return max(filter(self._is_complete, self._steps()), default=None)

    def clear(self) -> None:
        """Remove all checkpoints, and nothing else."""
        self._remove(self._steps())

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}.pt"

    def _steps(self) -> list[int]:
        """The steps that have a checkpoint, or a part of one, in ascending order."""
        names = [_NAME.fullmatch(path.name) for path in self._folder.glob("step_*")]
        return sorted({int(name[1]) for name in names if name})

    def _is_complete(self, step: int) -> bool:
        """Whether this checkpoint has a manifest, and the size that it says."""
        path = self._path(step)
        try:
            return path.stat().st_size == _read_manifest(path).size
        except (OSError, ValueError, TypeError):
            return False

    def _remove(self, steps: list[int]) -> None:
        """Remove these checkpoints, and what a kill in the middle of writing left."""
        for step in steps:  # first the manifest: without it the data do not count
            self._path(step).with_suffix(".json").unlink(missing_ok=True)
            self._path(step).unlink(missing_ok=True)
        for torn in self._folder.glob("step_*.tmp"):
            torn.unlink()


def _read_manifest(path: Path) -> _Manifest:
    """The manifest of the checkpoint `path`; raises ValueError, TypeError or OSError if that cannot be read."""
    return _Manifest(**json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


def _verified(path: Path, step: int) -> bytes:
    """The bytes of a checkpoint; raises ValueError, TypeError or OSError if they are not those written."""
    manifest = _read_manifest(path)
    data = path.read_bytes()
    if len(data) != manifest.size:
        raise ValueError(f"{len(data)} bytes instead of {manifest.size}")
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise ValueError("its SHA-256 is not the one written")
    if manifest.step != step:
        raise ValueError(f"its manifest is of step {manifest.step}")
    return data
