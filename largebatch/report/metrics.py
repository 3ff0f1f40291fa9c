"""Metric records: written to JSON lines and to TensorBoard, each step once, however often a run was resumed.

A record is a flat dict with ``step`` (the number of updates done when it was written), ``epoch``, and any of
``train/loss, train/top1_error, lr, global_batch, images_per_second, data_wait, compute, slowest_rank, slowdown,
deal/rank_R`` (virtual workers of rank R from here on, where the deal changes), ``skipped_steps, overflowed_steps,
dropped_workers, skipped_images, gradient_noise_scale (images), gradient_noise, gradient_squared_norm, val/loss,
val/top1_error, val/top5_error, val/skipped_images, weights_sha256``, and with an average of the weights
``val/ema_loss, val/ema_top1_error, val/ema_top5_error, ema_weights_sha256``.
``metrics.jsonl`` is the truth: after a stop it is cut back to the checkpoint, and ``tensorboard/`` is rebuilt
from what is left.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from largebatch.errors import DataError
from largebatch.report.files import write_bytes_atomically, write_text_atomically
from largebatch.report.own_writer import OwnWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
SAMPLES_FILE = "samples.png"
_NOT_A_SCALAR = ("step", "time")
_OWN_EVENTS = ".largebatch"  # ends the names of our event files


class MetricsWriter(Protocol):
    """What takes the records of a run."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record; ``record["step"]`` is larger than in the record before."""

    def samples(self, png: bytes) -> None:
        """Take the image of the first training images, before the first record."""

    def close(self) -> None:
        """Write what is still held back; nothing may be written afterwards."""


def open_writers(
    run_dir: Path, *, is_main: bool, first_step: int, own: Sequence[str] = (), config: dict[str, Any] | None = None
) -> MetricsWriter:
    """The writer of a run's records; off the main rank one that does nothing.

    ``first_step`` is the smallest ``step`` that this process may write: 0 for a run from the start, the
    checkpoint's number of updates + 1 for a resumed one. What an earlier process left from there on is
    dropped, so write a step's record before its checkpoint. `own` are import paths of writers of the user's own, who
    are given the folder and `config`. Raises DataError for a damaged metrics file, ConfigError for a writer that fails.
    """
    if not is_main:
        return _NoWriter()
    run_dir.mkdir(parents=True, exist_ok=True)
    kept = _cut_back(run_dir, first_step)
    writer = _RunWriter(run_dir, kept, [OwnWriter(path, run_dir, config or {}) for path in own])
    if first_step > 0:
        writer.show_samples()
    return writer


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; a value that was not finite is None.

    A last line without its newline is one that a kill tore, or that is being written: it is left out. Raises
    DataError when the file is missing or another line is no record.
    """
    path = run_dir / METRICS_FILE
    try:
        *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; is {run_dir} the folder of a run?") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8 (byte {error.start}); delete it, or --resume never") from None
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


class _NoWriter:
    """Off the main rank: takes every record and does nothing."""

    def write(self, record: dict[str, Any]) -> None:
        pass

    def samples(self, png: bytes) -> None:
        pass

    def close(self) -> None:
        pass


class _RunWriter:
    """JSON lines and TensorBoard scalars of one run."""

    def __init__(self, run_dir: Path, kept: list[dict[str, Any]], own: list[OwnWriter]) -> None:
        self._run_dir, self._own = run_dir, own
        self._lines = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._scalars = _rebuild_tensorboard(run_dir / TENSORBOARD_FOLDER, kept)
        self._last_step = kept[-1]["step"] if kept else -1

    def write(self, record: dict[str, Any]) -> None:
        assert record["step"] > self._last_step, f"step {record['step']} after {self._last_step}"
        self._last_step = record["step"]
        finite = {key: v if isinstance(v, str) or math.isfinite(v) else None for key, v in record.items()}
        line = finite | {"time": time.time()}
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()  # a killed process loses what it held itself, not what the system holds
        _add_scalars(self._scalars, line)
        for writer in self._own:
            writer.write(record)

    def samples(self, png: bytes) -> None:
        write_bytes_atomically(self._run_dir / SAMPLES_FILE, png)
        self.show_samples()

    def show_samples(self) -> None:
        """In TensorBoard too, if the file is there and whole."""
        import numpy as np
        from PIL import Image

        with contextlib.suppress(OSError), Image.open(self._run_dir / SAMPLES_FILE) as image:
            self._scalars.add_image("train/first_images", np.asarray(image), global_step=0, dataformats="HWC")

    def close(self) -> None:
        for writer in self._own:
            writer.close()
        self._lines.close()
        self._scalars.close()


def _cut_back(run_dir: Path, first_step: int) -> list[dict[str, Any]]:
    """Drop the records from ``first_step`` on, and a torn line, from the file; the records that stay."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    kept = [record for record in read_metrics(run_dir) if record["step"] < first_step]
    write_text_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise DataError(
            f"{place}: {line[:60]!r} is not a metric record (a JSON object with a 'step'); delete that line"
        )
    return record


def clear_tensorboard(folder: Path) -> None:
    """Remove our own event files from `folder`; what else lies there is somebody else's."""
    for events in folder.glob(f"events.out.tfevents.*{_OWN_EVENTS}"):
        with contextlib.suppress(OSError):  # a file system may keep one that a viewer still reads
            events.unlink()


def _rebuild_tensorboard(folder: Path, records: list[dict[str, Any]]) -> Any:
    """A SummaryWriter on ``folder``, which holds the scalars of ``records`` and nothing else.

    Event files cannot be cut: their writer holds events back, and a kill leaves any part of them.
    """
    # Takes a second to import, so only the process that writes pays for it.
    from torch.utils.tensorboard import SummaryWriter

    clear_tensorboard(folder)
    writer = SummaryWriter(str(folder), filename_suffix=_OWN_EVENTS)
    for record in records:
        _add_scalars(writer, record)
    return writer


def _add_scalars(writer: Any, record: dict[str, Any]) -> None:
    for key, value in record.items():
        if key not in _NOT_A_SCALAR and not isinstance(value, str):
            scalar = math.nan if value is None else value
            writer.add_scalar(key, scalar, global_step=record["step"], walltime=record["time"])
