"""Checkpoints: atomic, verified by checksum, never unpickled beyond tensors and plain values (contract 9)."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from largebatch.errors import UserError
from largebatch.report.files import write_json_atomically

FORMAT = 1


@dataclass
class TrainState:
    """Everything that a training is, between two steps: what a checkpoint holds."""

    step: int
    """Updates done."""
    images_consumed: int
    order_fingerprint: str
    """Hash of the shuffle of the epoch that `step` stands in."""
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    """Loss scaling (fp16); empty otherwise."""
    interval: dict[str, Any]
    """Sums since the last metrics record."""
    recent_top1_errors: list[float]
    """Validation errors of the last epochs, newest last."""
    last_validation: dict[str, float]
    """Metrics of the newest evaluation."""
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
    """The inverse of `serialise`, tensors on `device`; loads tensors and plain values only."""
    loaded = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    if loaded.pop("format") != FORMAT:
        raise UserError(f"the checkpoint is of another format than {FORMAT}; it was written by another version")
    return TrainState(**loaded)


def _shallow(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in state.__dataclass_fields__}


@dataclass(frozen=True)
class _Manifest:
    """What stands beside each checkpoint: it counts only with a manifest that agrees."""

    step: int
    size: int
    sha256: str


class CheckpointFolder:
    """The checkpoints of a run, ``step_00000123.pt`` each with its manifest ``step_00000123.json``."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, step: int, data: bytes) -> Path:
        """Write `data` as the checkpoint of `step`, then drop all but the newest `keep`.

        The data come first and the manifest last, each by rename, so that a kill at any moment leaves either
        a whole checkpoint or none, and never touches the ones before.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step:08d}.pt"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        manifest = _Manifest(step, len(data), hashlib.sha256(data).hexdigest())
        write_json_atomically(path.with_suffix(".json"), asdict(manifest))
        for old in self._manifests()[: -self._keep]:
            old.unlink()  # first the manifest: without it the data do not count
            old.with_suffix(".pt").unlink(missing_ok=True)
        return path

    def newest(self, warn: Callable[[str], None]) -> bytes | None:
        """The newest checkpoint that is whole, or None; each damaged one is passed over and told to `warn`."""
        for manifest in reversed(self._manifests()):
            path = manifest.with_suffix(".pt")
            try:
                return _verified(path, manifest)
            except (OSError, ValueError, TypeError) as error:
                warn(f"checkpoint {path} is damaged ({error}); falling back to the one before")
        return None

    def _manifests(self) -> list[Path]:
        return sorted(self._folder.glob("step_*.json"))


def _verified(path: Path, manifest_path: Path) -> bytes:
    """The bytes of a checkpoint; raises ValueError, TypeError or OSError if they are not those written."""
    manifest = _Manifest(**json.loads(manifest_path.read_text()))
    data = path.read_bytes()
    if len(data) != manifest.size:
        raise ValueError(f"{len(data)} bytes instead of {manifest.size}")
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise ValueError("its SHA-256 is not the one written")
    return data
