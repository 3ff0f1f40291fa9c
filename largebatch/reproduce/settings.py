"""An experiment as its file describes it: rows of config deltas, compared with one of them, at several scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from largebatch.configfile.loading import load_config
from largebatch.configfile.shipped import EXPERIMENTS, shipped_experiments
from largebatch.errors import UserError
from largebatch.section import Section
from largebatch.wording import did_you_mean

Scale = Literal["smoke", "cpu", "gpu", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "cpu", "gpu", "paper")


class PaperValue(Section):
    """What the paper reports for a row: top-1 error in percent over five runs."""

    error: float
    """Mean."""
    std: float | None = None
    """Standard deviation, where the paper gives one."""


class Expectation(Section):
    """An order of two rows that the source states without a spread to test it by."""

    lower: str
    """The row whose measure is lower."""
    than: str
    """The row whose measure is higher."""


class Row(Section):
    """One line of the table: a config delta, trained once for each seed."""

    name: str
    """Its name in tables and plots."""
    base: str | None = None
    """The config that it changes, instead of the scale's."""
    config: dict[str, Any] = Field(default={})
    """What it changes, at every scale."""
    at: dict[Scale, dict[str, Any]] = Field(default={})
    """What it changes besides, at one scale."""
    only: list[Scale] | None = None
    """Scales that have this row; null for all."""
    ranks: int | None = Field(None, ge=1)
    """Processes that execute it, where the comparison is about them; null: as many as the launcher has free."""
    start: str | None = None
    """An earlier row, from whose model of the same seed this one starts (`model.init_from`)."""
    against: str | None = None
    """The row that it is compared with, instead of the experiment's reference; its own name for none."""
    line: str = ""
    """Rows of one line are joined in plots of a sweep."""
    paper: PaperValue | None = None


class ScaleSettings(Section):
    """How large the experiment is made."""

    base: str
    """The config that all rows change: a file, relative to the experiment's, or the name of a shipped one."""
    config: dict[str, Any] = Field(default={})
    """What all rows change."""
    seeds: int = Field(ge=1)
    """Each row is trained with the seeds 0, 1, ... below this."""


class CurveSettings(Section):
    """The training curve that is drawn for each row."""

    metric: Literal["train/top1_error", "train/loss"] = "train/top1_error"
    every_steps: int | None = Field(None, ge=1)
    """One point every N steps; null: one per epoch."""
    table: bool = False
    """Also print it as a table."""


class PlotSettings(Section):
    """One plot."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Its file is <experiment>_<name>.png."""
    kind: Literal["curves", "sweep", "dots"]
    """curves: training curves; sweep: what is measured, against `x`; dots: what is measured, a line for each row."""
    x: Literal["global_batch", "peak_lr"] = "global_batch"
    rows: list[str] = Field(default=[])
    """Rows that it shows; empty for all."""


class Experiment(Section):
    """A comparison between training runs."""

    title: str
    source: str
    """Where the comparison was published."""
    text: str
    """What it asks and how, for the report."""
    reference: str
    """The row that the others are compared with."""
    measure: Literal["top1_error", "train_loss"] = "top1_error"
    """top1_error: median of the last five evaluations; train_loss: the last point of the training curve."""
    curve: CurveSettings = CurveSettings()
    plots: list[PlotSettings]
    expect: list[Expectation] = Field(default=[])
    """Orders that the report checks, in addition to the rows' `paper` values."""
    compare_weights: bool = False
    """Also report how far each run's weights are from those of the same seed in the row it is compared with."""
    noise_scale: bool = False
    """The rows measure the gradient noise scale: report it, and draw it into sweeps over the minibatch."""
    readme: bool = False
    """Its table and plots belong in docs/results.md."""
    rows: list[Row] = Field(min_length=1)
    scales: dict[Scale, ScaleSettings]

    @model_validator(mode="after")
    def _names_exist(self) -> Experiment:
        names = [row.name for row in self.rows]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"rows: {sorted(twice)} are named twice; give each row its own name")
        asked = [self.reference, *(name for row in self.rows for name in (row.against, row.start) if name)]
        asked += [name for plot in self.plots for name in plot.rows]
        asked += [name for order in self.expect for name in (order.lower, order.than)]
        missing = [name for name in asked if name not in names]
        if missing:
            raise ValueError(f"there is no row {missing[0]!r}{did_you_mean(missing[0], names)}")
        for place, row in enumerate(self.rows):
            if row.start is not None and row.start not in names[:place]:
                raise ValueError(f"rows: {row.name!r} starts from {row.start!r}, which must come before it")
        return self

    def rows_at(self, scale: Scale) -> list[Row]:
        """The rows that `scale` has, in order."""
        return [row for row in self.rows if row.only is None or scale in row.only]


def find_experiment(name: str) -> Path:
    """The file of the experiment `name`: a shipped one, or a path. Raises UserError."""
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else EXPERIMENTS / f"{name}.yaml"
    if not path.is_file():
        known = list(shipped_experiments())
        what = f"no file {path}" if is_path else "no such experiment"
        raise UserError(f"experiment {name!r}: {what}{did_you_mean(name, known)}; shipped: {', '.join(known)}")
    return path


def read_experiment(path: Path) -> Experiment:
    """The experiment in a YAML file. Raises ConfigError."""
    return load_config(path, (), Experiment)
