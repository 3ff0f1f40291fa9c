"""The commands `reproduce run`, `status` and `report`: what they do and print."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from largebatch.errors import UserError
from largebatch.report.files import write_json_atomically, write_text_atomically
from largebatch.reproduce.collect import collect, trained_on
from largebatch.reproduce.folders import ENDED, Folders, Standing, steps_of, unique, work_of
from largebatch.reproduce.grid import Grid, Run, make_grid
from largebatch.reproduce.local import LocalRunner, log_of, usable_cores
from largebatch.reproduce.plots import draw_plots
from largebatch.reproduce.settings import Scale
from largebatch.reproduce.slurm import submit_arrays
from largebatch.reproduce.tables import README_BEGIN, README_END, markdown, put_into, readme_block
from largebatch.reproduce.verdict import renew_verdicts

_SECONDS_BETWEEN_LOOKS = 5.0


def run(names: Sequence[str], scale: Scale, out: Path, jobs: int | None) -> int:
    """Train what is left of the experiments `names` on this machine; the exit status: 1 if a run failed."""
    grids = [make_grid(name, scale) for name in names]
    folders = Folders(out, scale)
    runs = _announce(grids, folders)
    left = [r for r in runs if folders.standing(r).state not in ENDED]
    if left:
        gpus = _gpus() if any(r.config.execution.device != "cpu" for r in left) else 0
        jobs = jobs or gpus or max(1, usable_cores() // left[0].config.execution.threads)
        with _Display(runs, folders) as display:
            LocalRunner(folders, jobs=jobs, gpus=gpus).execute(left, display)
    return _conclude(runs, folders)


def submit(names: Sequence[str], scale: Scale, out: Path, jobs: int | None) -> int:
    """Submit what is left of the experiments `names` to Slurm, at most `jobs` runs at a time."""
    folders = Folders(out, scale)
    runs = _announce([make_grid(name, scale) for name in names], folders)
    left = [r for r in runs if folders.standing(r).state not in (*ENDED, "running")]
    ready = [r for r in left if r.start is None or folders.standing(r.start).state in ENDED]
    for job in submit_arrays(ready, folders, jobs):
        print(f"submitted: {job}")
    if len(ready) < len(left):
        print(f"{len(left) - len(ready)} runs start from these: submit again when these are done")
    return 0


def status(names: Sequence[str], scale: Scale, out: Path) -> None:
    """Print where every row of the experiments stands; may be asked while they run, from anywhere."""
    folders = Folders(out, scale)
    for name in names:
        grid = make_grid(name, scale)
        print(f"{grid.name} at scale {scale}")
        width = max(len(row.name) for row in grid.experiment.rows_at(scale))
        for row in grid.experiment.rows_at(scale):
            standings = [folders.standing(r) for r in grid.row(row.name)]
            counts = Counter(standing.state for standing in standings)
            done = sum(standing.step for standing in standings)
            share = 100 * done / sum(steps_of(r) for r in grid.row(row.name))
            said = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
            print(f"  {row.name:<{width}}  {share:3.0f} %  {said}")
            for standing in standings:
                if standing.message:
                    print(f"  {'':<{width}}  {standing.state}: {standing.message}")


def report(
    names: Sequence[str], scale: Scale, out: Path, into: Path, readme: Path | None, *, from_json: bool = False
) -> None:
    """Write the reports of the experiments `names` into `into`/SCALE, and what docs/results.md shows of them.

    With `from_json` the numbers are those of the JSON files there, and no run is needed: only the presentation is
    regenerated.
    """
    folder = into / scale
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        grid = make_grid(name, scale)
        path = folder / f"{grid.name}.json"
        result = _read_result(path, grid) if from_json else collect(grid, Folders(out, scale))
        write_json_atomically(path, result)
        plots = draw_plots(result, folder, lambda text: print(f"warning: {text}"))
        write_text_atomically(folder / f"{grid.name}.md", markdown(result, plots))
        print(f"{folder / grid.name}.md")
    if readme is not None:
        _write_block(folder, readme)


def _read_result(path: Path, grid: Grid) -> dict[str, Any]:
    """An earlier report's JSON, to be shown as the experiment says today. Raises UserError."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        known = {row["name"] for row in result["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--from-json: {path} is not the JSON of a report ({error}); write one from runs, without --from-json"
        ) from None
    renew_verdicts(result["rows"])
    plots = [plot.model_dump(mode="json") for plot in grid.experiment.plots]
    shown = [{**plot, "rows": [name for name in plot["rows"] if name in known]} for plot in plots]
    return {**result, "trained": trained_on(grid), "plots": shown}


def _write_block(folder: Path, readme: Path) -> None:
    """Replace the block of the page `readme` by the results in `folder` that ask to be shown."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    block = readme_block(results, Path(os.path.relpath(folder, readme.parent)).as_posix())
    text = put_into(readme.read_text(encoding="utf-8"), block)
    if text is None:
        raise UserError(
            f"--readme: {readme} has no lines {README_BEGIN} and {README_END}; add them where the block goes"
        )
    write_text_atomically(readme, text)


def _announce(grids: Sequence[Grid], folders: Folders) -> list[Run]:
    """Say what there is to do and what has changed; all runs, by seed, so that early looks see every row."""
    for grid in grids:
        for line in folders.changes(grid):
            print(f"{grid.name}: {line}", flush=True)
        folders.remember(grid)
    everything = [r for grid in grids for r in grid.runs]
    runs = unique(sorted(everything, key=lambda r: r.seed))
    ended = sum(folders.standing(r).state in ENDED for r in runs)
    shared = len(everything) - len(runs)
    print(
        f"{', '.join(grid.name for grid in grids)} at scale {grids[0].scale}: {len(runs)} runs"
        + (f" ({shared} more are the same as one of these)" if shared else "")
        + f", of which {ended} are already done",
        flush=True,
    )
    return runs


def _conclude(runs: Sequence[Run], folders: Folders) -> int:
    failed = [r for r in runs if folders.standing(r).state == "failed"]
    for r in failed:
        print(f"failed: {r.row}, seed {r.seed}: {folders.standing(r).message} (see {log_of(folders, r)})")
    print(
        f"{len(runs) - len(failed)} of {len(runs)} runs are done"
        + ("; the same command tries them again" * bool(failed))
    )
    return int(bool(failed))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


class _Display:
    """A bar with the time left on a terminal, lines elsewhere."""

    def __init__(self, runs: Sequence[Run], folders: Folders) -> None:
        self._runs, self._folders = runs, folders
        self._console = Console(file=sys.stdout)
        self._work = {r.key: work_of(r, steps_of(r)) for r in runs}
        self._done = {r.key: self._work_done(r) for r in runs}
        self._at_first = sum(self._done.values())
        self._ended = sum(folders.standing(r).state in ENDED for r in runs)
        self._running: dict[str, Run] = {}
        self._began = self._looked = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.fields[said]}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=sum(self._work.values()), said="")

    def __enter__(self) -> _Display:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop() if self._console.is_terminal else None

    def started(self, run: Run, ranks: int) -> None:
        """See `Watcher`."""
        self._running[run.key] = run

    def ended(self, run: Run, standing: Standing) -> None:
        """See `Watcher`."""
        self._running.pop(run.key, None)
        self._ended += 1
        self._done[run.key] = self._work[run.key]
        self._say(f"{run.row}, seed {run.seed}: {standing.state}")

    def tick(self) -> None:
        """See `Watcher`."""
        if time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        for run in self._running.values():
            self._done[run.key] = self._work_done(run)
        self._bar.update(self._task, completed=sum(self._done.values()), said=self._figures())

    def _say(self, text: str) -> None:
        line = f"{text}  ({self._figures()})"
        if self._console.is_terminal:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def _figures(self) -> str:
        return f"{self._ended} of {len(self._runs)} runs{self._time_left()}"

    def _time_left(self) -> str:
        done, total = sum(self._done.values()), sum(self._work.values())
        gone = done - self._at_first
        if not gone or done >= total:
            return ""
        seconds = (time.monotonic() - self._began) / gone * (total - done)
        return f", time left {timedelta(seconds=round(seconds))}"

    def _work_done(self, run: Run) -> int:
        return work_of(run, self._folders.standing(run).step)
