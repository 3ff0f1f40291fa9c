"""From run folders to the one JSON file behind tables, plots and docs/results.md."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from largebatch.configfile.shipped import config_name
from largebatch.data.catalog import whole_set
from largebatch.errors import UserError
from largebatch.reproduce.curves import Curve, early_sign, over_seeds, read_curve
from largebatch.reproduce.folders import Folders, images_of, schedule_of, steps_of
from largebatch.reproduce.grid import Grid, Run, training_code_digest
from largebatch.reproduce.knee import find_knee, noise_scale_of
from largebatch.reproduce.settings import Row
from largebatch.reproduce.statistics import Sample, sample, welch
from largebatch.reproduce.verdict import (
    best_of_lines,
    cannot_tell,
    check_expectation,
    compare_order,
    is_at_chance,
    paper_sample,
    verdict,
)
from largebatch.reproduce.weights import weight_distance


def collect(grid: Grid, folders: Folders) -> dict[str, Any]:
    """Everything that the report of an experiment says, as JSON can hold it. Raises UserError if no run has ended."""
    rows = {row.name: _row(row, grid, folders) for row in grid.experiment.rows_at(grid.scale)}
    if not any(run["state"] == "finished" for row in rows.values() for run in row["runs"]):
        raise UserError(f"{grid.name} at scale {grid.scale}: no run has finished yet; start: {_command(grid)}")
    chance = chance_of(grid, _classes(grid, folders))
    for found in rows.values():
        found["at_chance"] = is_at_chance(found["sample"], chance)
    for row in grid.experiment.rows_at(grid.scale):
        _compare(row, rows, grid, folders)
    order = compare_order(list(rows.values()))
    at_scale = rows.keys()
    expected = [e for e in grid.experiment.expect if {e.lower, e.than} <= at_scale]
    sweeps_lr = any(plot.kind == "sweep" and plot.x == "peak_lr" for plot in grid.experiment.plots)
    knee = None
    if grid.experiment.noise_scale:
        predicted = rows[grid.experiment.reference]["noise_scale"]
        knee = find_knee(list(rows.values()), grid.experiment.reference, predicted)
    return {
        "experiment": grid.name,
        "scale": grid.scale,
        "settings": grid.experiment.model_dump(
            mode="json", include={"title", "source", "text", "reference", "measure"}
        ),
        "curve": grid.experiment.curve.model_dump(mode="json"),
        "trained": trained_on(grid),
        "chance": chance,
        "plots": [plot.model_dump(mode="json") for plot in grid.experiment.plots],
        "rows": [_plain(row) for row in rows.values()],
        "order": order,
        "expected": [check_expectation(e, rows) for e in expected],
        "best": best_of_lines(list(rows.values())) if sweeps_lr else [],
        "knee": knee,
        "readme": grid.experiment.readme,
        "provenance": _provenance(grid, folders),
    }


def trained_on(grid: Grid) -> dict[str, str]:
    """The models and data sets of the runs by their names, for titles."""
    configs = [run.config for run in grid.runs]
    return {
        "model": ", ".join(_once([c.model.name for c in configs])),
        "data": ", ".join(_once([c.data.name for c in configs])),
    }


def chance_of(grid: Grid, classes: int | None) -> float | None:
    """What the measure would be by guessing among `classes`."""
    if classes is None:
        return None
    return 100 * (1 - 1 / classes) if grid.experiment.measure == "top1_error" else math.log(classes)


def _classes(grid: Grid, folders: Folders) -> int | None:
    """Of the set itself, or as a finished run found it on the disk."""
    for run in grid.row(grid.experiment.reference):
        known = whole_set(run.config.data)
        if known is not None:
            return known.classes
        with contextlib.suppress(OSError, ValueError, KeyError):
            return len(_json(folders.of(run) / "inference.json")["class_names"]) or None
    return None


def _command(grid: Grid) -> str:
    return shlex.join(["largebatch", "reproduce", "run", grid.asked, "--scale", grid.scale])


def _row(row: Row, grid: Grid, folders: Folders) -> dict[str, Any]:
    """A row by itself. `sample`, `paper_sample` and `curves` are for comparisons, and left out of the JSON."""
    tabled = {name for plot in grid.experiment.plots if plot.kind == "curves" for name in plot.rows} or {row.name}
    runs = grid.row(row.name)
    first = runs[0]
    finished = [folders.of(run) for run in runs if folders.standing(run).state == "finished"]
    curves = {run.seed: _curve(run, grid, folders) for run in runs if folders.standing(run).state == "finished"}
    outcomes = [_outcome(run, grid, folders, curves) for run in runs]
    measured = sample([run["value"] for run in outcomes if run["value"] is not None])
    return {
        "name": row.name,
        "line": row.line,
        "command": _train_command(first),
        "ranks": row.ranks,
        "in_table": row.name in tabled,
        "global_batch": first.config.batch.global_batch,
        "peak_lr": schedule_of(first).peak_lr,
        "runs": outcomes,
        "noise_scale": noise_scale_of(finished) if grid.experiment.noise_scale else None,
        "sample": measured,
        "paper_sample": paper_sample(row.paper),
        "curves": list(curves.values()),
    }


def _train_command(run: Run) -> str:
    """What trains such a run by itself, but for the seed."""
    start = [f"model.init_from=runs/{run.start.key}/model.pt"] if run.start else []
    return shlex.join(["largebatch", "train", config_name(run.base), *run.overrides[:-1], *start])


def _outcome(run: Run, grid: Grid, folders: Folders, curves: dict[int, Curve]) -> dict[str, Any]:
    """One run: its state, and what was measured if it finished."""
    standing = folders.standing(run)
    outcome: dict[str, Any] = {"seed": run.seed, "key": run.key, "state": standing.state, "value": None}
    if standing.state != "finished":
        return outcome
    summary = json.loads((folders.of(run) / "summary.json").read_text(encoding="utf-8"))
    last = curves[run.seed][-1]
    value = summary["top1_error_median_last5"] if grid.experiment.measure == "top1_error" else last
    return {
        **outcome,
        "value": value,
        "top1_error": summary["top1_error"],
        "last_of_curve": last,
        "seconds": summary["seconds"],
    }


def bin_width(run: Run, grid: Grid) -> int:
    """Steps in one point of the training curve: an epoch, unless the experiment says how many."""
    return grid.experiment.curve.every_steps or images_of(run) // run.config.batch.global_batch


def _curve(run: Run, grid: Grid, folders: Folders) -> Curve:
    return read_curve(folders.of(run), grid.experiment.curve.metric, bin_width(run, grid), steps_of(run))


def _compare(row: Row, rows: dict[str, dict[str, Any]], grid: Grid, folders: Folders) -> None:
    """Add to a row how it compares with the row that it is held against, here and in the paper."""
    this, other = rows[row.name], rows[row.against or grid.experiment.reference]
    this["against"] = other["name"]
    this["comparison"] = this["verdict"] = this["early_sign"] = this["weights"] = None
    if this is other:
        return
    ours = welch(other["sample"], this["sample"])
    this["comparison"] = asdict(ours) if ours else None
    papers = welch(other["paper_sample"], this["paper_sample"])
    this["verdict"] = cannot_tell(other["name"]) if other["at_chance"] and papers else verdict(ours, papers)
    is_error = grid.experiment.curve.metric == "train/top1_error"
    if not other["at_chance"] and is_error and grid.experiment.curve.every_steps is None:
        first = math.ceil(grid.row(row.name)[0].config.schedule.warmup.epochs)
        sign = early_sign(this["curves"], other["curves"], first)
        this["early_sign"] = sign.as_dict() if sign else None
    if grid.experiment.compare_weights:
        theirs = {run.seed: folders.of(run) for run in grid.row(other["name"])}
        this["weights"] = [
            weight_distance(folders.of(run), theirs[run.seed]) for run in grid.row(row.name) if run.seed in theirs
        ]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can hold it."""
    plain = {key: value for key, value in row.items() if key not in ("sample", "paper_sample", "curves")}
    curve = [_sample_dict(point) for point in over_seeds(row["curves"])]
    return {
        **plain,
        "result": _sample_dict(row["sample"]),
        "paper": _sample_dict(row["paper_sample"]),
        "curve": curve,
    }


def _sample_dict(found: Sample | None) -> dict[str, Any] | None:
    return asdict(found) if found else None


def _provenance(grid: Grid, folders: Folders) -> dict[str, Any]:
    """What the runs ran on, for how long, and with which command: all that two reports of one training differ in."""
    ended = [folders.of(run) for run in grid.runs if folders.standing(run).state == "finished"]
    environments = [_json(folder / "environment.json") for folder in ended]
    commits = [e["git"]["commit"] + (" with changes" if e["git"]["dirty"] else "") for e in environments if e["git"]]
    machines = [_machine(e) for e in environments]
    versions = [", ".join(f"{name} {version}" for name, version in e["packages"].items()) for e in environments]
    return {
        "command": _command(grid),
        "code": training_code_digest(),
        "commits": _once(commits),
        "machines": _once(machines),
        "versions": _once([f"Python {e['python']}, {v}" for e, v in zip(environments, versions, strict=True)]),
        "seconds": math.fsum(_json(folder / "summary.json")["seconds"] for folder in ended),
    }


def _machine(environment: dict[str, Any]) -> str:
    cpu = ", ".join(
        [environment["cpu"]["model"], environment["cpu"]["capability"], f"{environment['cpu']['usable_cores']} cores"]
    )
    gpus = [device["name"] for device in (environment["cuda"] or {}).get("devices", [])]
    return f"{len(gpus)} x {gpus[0]}; {cpu}" if gpus else cpu


def _once(values: Sequence[str]) -> list[str]:
    return sorted(set(values))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
