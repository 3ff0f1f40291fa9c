"""The curves of a run as an image file."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import yaml

from largebatch.errors import DataError
from largebatch.report.figure import Warn, draw, explain, panels
from largebatch.report.metrics import METRICS_FILE, read_metrics

CURVES_FILE = "curves.png"
_FEW_POINTS = 40  # up to here each point is marked, since a line of one point shows nothing
_COLOURS = {"train": "#4c78a8", "val": "#e45756", "ema": "#b279a2", "lr": "#54a24b"}
_EMA = "validation, averaged weights"
_CAPTION = "training: means since the previous point, in training mode, augmented; validation: all images"
Points = list[tuple[float, float]]


def draw_curves(run_dir: Path, warn: Warn) -> bool:
    """Draw loss, top-1 error and learning rate over epochs into ``run_dir/curves.png``; False if it only warned."""
    return draw(run_dir / CURVES_FILE, lambda: _curves(run_dir), warn)


def _curves(run_dir: Path) -> Any:
    records = read_metrics(run_dir)
    if not records:
        raise DataError(f"{run_dir / METRICS_FILE}: no metric records yet; train some steps first")
    figure, (loss, error, lr) = panels(3, 1, size=(8, 3), sharex=True)
    _plot(loss, records, {"train/loss": "training", "val/loss": "validation", "val/ema_loss": _EMA})
    _plot(error, records, {"train/top1_error": "training", "val/top1_error": "validation", "val/ema_top1_error": _EMA})
    _plot(lr, records, {"lr": "learning rate"}, jumps=_jumps(run_dir))
    loss.set_ylabel("loss (nats per image)")
    error.set_ylabel("top-1 error (%)")
    lr.set_ylabel("learning rate")
    lr.set_xlabel("epoch")
    error.set_ylim(bottom=0)
    lr.set_ylim(bottom=0)
    explain(figure, _title(run_dir, records), _CAPTION)
    return figure


def _plot(axes: Any, records: list[dict[str, Any]], names: dict[str, str], jumps: list[float] | None = None) -> None:
    """One line per metric in ``names`` (metric -> its name in the legend) that the records hold."""
    for key, name in names.items():
        points = [(record["epoch"], _number(record[key])) for record in records if key in record]
        if not points:
            continue
        group = "ema" if name == _EMA else key.split("/")[0]
        marker = "o" if len(points) <= _FEW_POINTS else None
        line = zip(*with_jumps(points, jumps or []), strict=True)
        axes.plot(*line, label=name, color=_COLOURS[group])
        axes.plot(*zip(*points, strict=True), color=_COLOURS[group], marker=marker, markersize=3, linestyle="none")
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()


def with_jumps(points: Points, jumps: list[float]) -> Points:
    """``points`` with a vertical step at each of ``jumps``: up to there the value was that of the record before."""
    line = points[:1]
    for before, after in itertools.pairwise(points):
        for jump in jumps:
            if before[0] <= jump < after[0]:
                line += [(jump, before[1]), (jump, after[1])]
        line.append(after)
    return line


def _jumps(run_dir: Path) -> list[float]:
    """Epochs at which the learning rate of the run jumps; none where its folder does not say."""
    plan, schedule = _read(run_dir / "plan.json"), _read(run_dir / "config.yaml").get("schedule", {})
    steps = list(plan.get("decay_steps", []))
    if schedule.get("warmup", {}).get("kind") == "constant":
        steps.append(plan.get("warmup_steps", 0))
    return sorted(step / plan["steps_per_epoch"] for step in steps if step)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: float | None) -> float:
    """NaN for a value that was not finite: the line has a gap there."""
    return math.nan if value is None else value


def _title(run_dir: Path, records: list[dict[str, Any]]) -> str:
    errors = [value for record in records if (value := record.get("val/top1_error")) is not None]
    name = run_dir.resolve().name
    first = f"{name}: validation top-1 error {errors[-1]:.2f} %" if errors else name
    config, plan = _read(run_dir / "config.yaml"), _read(run_dir / "plan.json")
    if not config or not plan:
        return first
    model, data = config["model"]["name"], config["data"]["name"]
    return f"{first}\n{model} on {data}, kn = {plan['global_batch']}, seed {config['seed']}"
