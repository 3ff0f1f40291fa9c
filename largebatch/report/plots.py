"""The curves of a run as a picture."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from largebatch.errors import DataError
from largebatch.report.files import write_bytes_atomically
from largebatch.report.metrics import METRICS_FILE, read_metrics

CURVES_FILE = "curves.png"
_FEW_POINTS = 40  # up to here each point is marked, since a line of one point shows nothing
_COLOURS = {"train": "#4c78a8", "val": "#e45756", "lr": "#54a24b"}


def draw_curves(run_dir: Path) -> Path:
    """Draw loss, top-1 error and learning rate over epochs into ``run_dir/curves.png``; returns its path.

    Raises DataError when the run has no metric records.
    """
    # Slow to import, and a Figure of its own leaves a user's pyplot and its backend alone.
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    if not records:
        raise DataError(f"{run_dir / METRICS_FILE}: no metric records yet; train some steps first")
    figure = Figure(figsize=(8, 9), dpi=120, layout="constrained")
    loss, error, lr = figure.subplots(3, 1, sharex=True)
    _draw(loss, records, {"train/loss": "training", "val/loss": "validation"})
    _draw(error, records, {"train/top1_error": "training", "val/top1_error": "validation"})
    _draw(lr, records, {"lr": "learning rate"})
    loss.set_ylabel("loss (nats per image)")
    error.set_ylabel("top-1 error (%)")
    lr.set_ylabel("learning rate")
    lr.set_xlabel("epoch")
    error.set_ylim(bottom=0)
    lr.set_ylim(bottom=0)
    figure.suptitle(_title(run_dir, records))
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    path = run_dir / CURVES_FILE
    write_bytes_atomically(path, picture.getvalue())
    return path


def _draw(axes: Any, records: list[dict[str, Any]], names: dict[str, str]) -> None:
    """One line per metric in ``names`` (metric -> its name in the legend) that the records hold."""
    axes.grid(alpha=0.3)
    for key, name in names.items():
        points = [(record["epoch"], _number(record[key])) for record in records if key in record]
        if not points:
            continue
        group = key.split("/")[0]
        marker = "o" if len(points) <= _FEW_POINTS else None
        axes.plot(*zip(*points, strict=True), label=name, color=_COLOURS[group], marker=marker, markersize=3)
    if len(axes.lines) > 1:
        axes.legend()


def _number(value: float | None) -> float:
    """NaN for a value that was not finite: the line has a gap there."""
    return math.nan if value is None else value


def _title(run_dir: Path, records: list[dict[str, Any]]) -> str:
    errors = [value for record in records if (value := record.get("val/top1_error")) is not None]
    name = run_dir.resolve().name
    return f"{name}: validation top-1 error {errors[-1]:.2f} %" if errors else name
