"""What is known on disk of the runs of a scale.

``OUT/SCALE/runs/KEY/`` is a run folder of `train`, with ``log.txt`` (what the run printed) and, if it did not
finish, ``outcome.json`` next to its files. ``OUT/SCALE/EXPERIMENT.asked.json`` remembers which runs the experiment
last consisted of, only to say what has changed since.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.config import Config, differences, read_config
from largebatch.configfile.loading import dump_config
from largebatch.data.catalog import known_set
from largebatch.errors import EXIT_HEALTH, DataError, UserError
from largebatch.plan import make_order, run_schedule
from largebatch.recipe.schedule import Schedule
from largebatch.report.files import write_json_atomically, write_text_atomically
from largebatch.report.lock import hold_folder
from largebatch.report.metrics import read_metrics
from largebatch.reproduce.grid import Grid, Run

LOG = "log.txt"
_OUTCOME = "outcome.json"
ENDED = ("finished", "diverged")
"""States that nothing needs to be done about."""


@dataclass(frozen=True)
class Standing:
    """Where a run stands."""

    state: str
    """waiting (nothing done), started (partly done, no process running), running, finished, diverged (the loss was not
    finite: a result too), failed."""
    step: int = 0
    """Updates done, as far as its metrics say."""
    message: str = ""
    """Why it failed."""


class Folders:
    """The runs of one scale under `out`."""

    def __init__(self, out: Path, scale: str) -> None:
        self.root = out / scale

    def of(self, run: Run) -> Path:
        """The run folder of `run`."""
        return self.root / "runs" / run.key

    def standing(self, run: Run) -> Standing:
        """Where `run` stands, by what its folder holds."""
        folder = self.of(run)
        if (folder / "summary.json").exists() and (folder / "model.pt").exists():
            return Standing("finished", steps_of(run))
        step = _last_step(folder)
        if _is_held(folder):
            return Standing("running", step)
        with contextlib.suppress(OSError, ValueError):
            outcome = json.loads((folder / _OUTCOME).read_text(encoding="utf-8"))
            return Standing(outcome["state"], step, outcome["message"])
        return Standing("started" if step else "waiting", step)

    def begin(self, run: Run) -> Path:
        """Make the folder of a run that is about to be started or resumed."""
        folder = self.of(run)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {error.filename}: {error.strerror}; give a folder that can be written") from error
        (folder / _OUTCOME).unlink(missing_ok=True)
        return folder

    def end(self, run: Run, exit_status: int) -> Standing:
        """Note how the process of a run ended, unless it finished."""
        standing = self.standing(run)
        if standing.state == "finished":
            return standing
        state = "diverged" if exit_status == EXIT_HEALTH else "failed"
        message = last_words(self.of(run) / LOG) or f"ended with exit status {exit_status} and printed nothing"
        write_json_atomically(self.of(run) / _OUTCOME, {"state": state, "message": message})
        return Standing(state, standing.step, message)

    def changes(self, grid: Grid) -> list[str]:
        """What differs from when the experiment was last run: a line for each reason, with the runs it is of."""
        asked = self._asked(grid)
        reasons: dict[str, list[str]] = {}
        for run in grid.runs:
            before = asked.get(f"{run.row}, seed {run.seed}")
            if before is None or before["key"] == run.key:
                continue
            found = _config_changes(self.root / "runs" / before["key"], self.config_of(run))
            reason = "; ".join(found) or "the code or its number of ranks has changed since"
            reasons.setdefault(reason, []).append(f"{run.row} (seed {run.seed})")
        return [
            f"{'all runs' if len(names) == len(grid.runs) else ', '.join(names)}: to be run again, because {reason}"
            for reason, names in reasons.items()
        ]

    def remember(self, grid: Grid) -> None:
        """Keep which runs the experiment consists of now."""
        self.root.mkdir(parents=True, exist_ok=True)
        asked = {f"{run.row}, seed {run.seed}": {"key": run.key} for run in grid.runs}
        write_json_atomically(self._asked_file(grid), asked)

    def config_of(self, run: Run) -> Config:
        """The whole config of `run`, with the file of the weights that it starts from."""
        if run.start is None:
            return run.config
        weights = str((self.of(run.start) / "model.pt").absolute())
        model = run.config.model.model_copy(update={"init_from": weights})
        return run.config.model_copy(update={"model": model})

    def write_config(self, run: Run) -> Path:
        """The whole config of `run` as a file next to the run folders."""
        folder = self.root / "configs"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{run.key}.yaml"
        write_text_atomically(path, dump_config(self.config_of(run)))
        return path

    def _asked_file(self, grid: Grid) -> Path:
        return self.root / f"{grid.name}.asked.json"

    def _asked(self, grid: Grid) -> dict[str, Any]:
        try:
            return json.loads(self._asked_file(grid).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


def images_of(run: Run) -> int:
    """Training images of the run's set. Raises UserError where only the disk knows."""
    known = known_set(run.config.data)
    if known is None:
        raise UserError(f"row {run.row!r}: data.name {run.config.data.name}: an experiment needs a set of known size")
    return known.train_images


def schedule_of(run: Run) -> Schedule:
    """The schedule of a run, in steps."""
    return run_schedule(run.config, make_order(run.config, images_of(run)))


def steps_of(run: Run) -> int:
    """All updates of a run."""
    return schedule_of(run).total_steps


def work_of(run: Run, steps: int) -> int:
    """What `steps` updates of a run cost, in images."""
    return steps * run.config.batch.global_batch


def unique(runs: Iterable[Run]) -> list[Run]:
    """The runs without those that are the same as one before."""
    return list({run.key: run for run in reversed(list(runs))}.values())[::-1]


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _config_changes(folder: Path, config: Config) -> list[str]:
    try:
        return differences(read_config(folder / "config.yaml"), config)
    except UserError:
        return []


def _last_step(folder: Path) -> int:
    try:
        records = read_metrics(folder)
    except DataError:
        return 0
    return int(records[-1]["step"]) if records else 0


def _is_held(folder: Path) -> bool:
    """Whether a process trains in the folder."""
    try:
        with hold_folder(folder, patience_seconds=0.0):
            return False
    except UserError:
        return True
    except OSError:
        return False
