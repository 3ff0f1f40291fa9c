"""Writes checkpoints in the background, so that the step waits only for a copy of the state."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch

from largebatch.training.checkpoint import CheckpointFolder, TrainState, serialise


class BackgroundSaver:
    """Hands each state to a thread that serialises, checksums and writes it, one at a time and in order."""

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: TrainState) -> None:
        """Begin to write `state`, of which a copy is taken now; waits for the one before to be written."""
        self.wait()
        snapshot = _snapshot(state)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was begun is written (or has failed: see `take_error`)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def error(self) -> Exception | None:
        """The error of a checkpoint that could not be written, until `take_error` takes it."""
        return self._error

    def take_error(self) -> Exception | None:
        """The error of a checkpoint that could not be written, once."""
        error, self._error = self._error, None
        return error

    def _write(self, state: TrainState) -> None:
        try:
            self._folder.save(state.step, serialise(state))
        except Exception as error:  # disk full, folder read-only, no memory left for the bytes: the trainer decides
            self._error = self._error or error  # the first one, should the next fail before it is taken


def _snapshot(state: TrainState) -> TrainState:
    """`state` with every tensor copied to main memory."""
    values: dict[str, Any] = {name: _copy(getattr(state, name)) for name in state.__dataclass_fields__}
    return TrainState(**values)


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return copy.copy(value)
