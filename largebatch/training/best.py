"""The best weights of a run so far, by a metric of its evaluations (`checkpoint.keep_best`)."""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.errors import DataError
from largebatch.report.files import write_bytes_atomically
from largebatch.training.checkpoint import load_tensors
from largebatch.training.replicas import digest_of

_log = logging.getLogger(__name__)


class BestWeights:
    """A file of the weights whose metric was lowest. Used on the main rank alone."""

    def __init__(self, path: Path, metric: str) -> None:
        self.state: dict[str, Any] = {}
        """``metric``, its lowest ``value``, the ``step`` of that and ``weights_sha256``; empty before the first."""
        self._path, self._metric = path, metric

    def offer(self, metrics: dict[str, float], model: nn.Module, *, step: int) -> None:
        """Keep what `model` holds if these metrics are its own and better than all before. Raises OSError."""
        value = metrics.get(self._metric, math.nan)
        if not value < self.state.get("value", math.inf):
            return
        write_weights(self._path, weights_of(model))
        digest = digest_of(model.state_dict())
        self.state = {"metric": self._metric, "value": value, "step": step, "weights_sha256": digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from `state`, unless it is of another metric or describes another file than the one that is there."""
        if state.get("metric") != self._metric:
            return
        try:
            with self._path.open("rb") as file:
                weights = load_tensors(file, torch.device("cpu"), name=str(self._path))
            if digest_of(weights) == state["weights_sha256"]:
                self.state = state
                return
            why = f"holds other weights than those of step {state['step']}"
        except (OSError, DataError, AttributeError) as error:
            why = str(error)
        _log.warning("warning: %s: %s; checkpoint.keep_best starts over", self._path, why)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's `state_dict` in main memory."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in model.state_dict().items()}


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a `state_dict`, atomically. Raises OSError."""
    buffer = io.BytesIO()  # torch's own writer has its own errors for a disk that is full
    torch.save(weights, buffer)
    write_bytes_atomically(path, buffer.getvalue())
