"""From an experiment and a scale to its runs: one for each row and seed, each with its whole config."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.config import Config, read_config
from largebatch.configfile.loading import digest
from largebatch.configfile.shipped import find_config
from largebatch.errors import ConfigError, UserError
from largebatch.reproduce.settings import Experiment, Row, Scale, find_experiment, read_experiment

_KEY_DIGITS = 16
# What a number of a run can depend on; a change elsewhere repeats no run.
_CODE_THAT_COUNTS = (
    "recipe",
    "data",
    "models",
    "distributed",
    "training",
    "run.py",
    "resume.py",
    "plan.py",
    "config.py",
)


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: str
    seed: int
    base: Path
    overrides: tuple[str, ...]
    """What `largebatch train BASE` takes to do the same."""
    config: Config
    ranks: int | None
    """Processes that must execute it; None where any number may."""
    key: str
    """Name of its folder: a hash of config, code and ranks, so rows that are the same share one run."""
    start: Run | None = None
    """The run whose weights it starts from."""


@dataclass(frozen=True)
class Grid:
    """All runs of an experiment at one scale."""

    name: str
    asked: str
    """The name or path that it was asked by: what a command that is printed needs."""
    scale: Scale
    experiment: Experiment
    runs: list[Run]

    def row(self, name: str) -> list[Run]:
        """The runs of one row, by seed."""
        return [run for run in self.runs if run.row == name]


def make_grid(name: str, scale: Scale) -> Grid:
    """The grid of the experiment `name` (or of the file of that path). Raises UserError."""
    path = find_experiment(name)
    experiment = read_experiment(path)
    if scale not in experiment.scales:
        raise UserError(f"{path}: has no scale {scale!r}; it has {', '.join(experiment.scales)}")
    code = training_code_digest()
    rows = experiment.rows_at(scale)
    if experiment.reference not in [row.name for row in rows]:
        raise ConfigError(f"{path}: reference: the row {experiment.reference!r} is not at scale {scale!r}")
    seeds = range(experiment.scales[scale].seeds)
    made: dict[tuple[str, int], Run] = {}
    for row in rows:
        for seed in seeds:
            start = made.get((row.start, seed)) if row.start else None
            if row.start and start is None:
                raise ConfigError(f"{path}: row {row.name!r}: start: the row {row.start!r} is not at scale {scale!r}")
            made[row.name, seed] = _make_run(path, experiment, row, scale, seed, code, start)
    return Grid(path.stem, name, scale, experiment, list(made.values()))


def _make_run(
    path: Path, experiment: Experiment, row: Row, scale: Scale, seed: int, code: str, start: Run | None
) -> Run:
    settings = experiment.scales[scale]
    delta: dict[str, str] = {}
    for layer in ({} if row.base else settings.config, row.config, row.at.get(scale, {})):
        delta.update(_flat(layer))
    overrides = (*(f"{key}={value}" for key, value in delta.items()), f"seed={seed}")
    base = find_config(row.base or settings.base, path.parent)
    try:
        config = read_config(base, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: row {row.name!r} at scale {scale}: {error}") from None
    identity = json.dumps([digest(config), code, row.ranks, *([start.key] if start else [])])
    key = hashlib.sha256(identity.encode()).hexdigest()[:_KEY_DIGITS]
    return Run(row.name, seed, base, overrides, config, row.ranks, key, start)


def _flat(delta: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The delta as (dotted key, value as JSON, which is YAML)."""
    for key, value in delta.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def training_code_digest() -> str:
    """SHA-256 of the code that the numbers of a run depend on; comments, docstrings and formatting do not count."""
    package = Path(__file__).parents[1]
    paths = [package / name for name in _CODE_THAT_COUNTS]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(
            str(file.relative_to(package)).encode() + b"\0" + bare_code(file.read_text(encoding="utf-8")).encode()
        )
    return hashed.hexdigest()


def bare_code(source: str) -> str:
    """The source as Python itself would write it, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_bare_text(part)]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_bare_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
