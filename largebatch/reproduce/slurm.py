"""Submits runs as Slurm arrays: one task for each run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from largebatch.errors import UserError
from largebatch.report.files import write_text_atomically
from largebatch.reproduce.folders import Folders
from largebatch.reproduce.grid import Run

SCRIPT = Path("launch/slurm_array.sbatch")


def submit_arrays(runs: Sequence[Run], folders: Folders, jobs: int | None) -> Iterator[str]:
    """Write the lists of tasks and submit them, at most `jobs` at a time; what sbatch answers to each.

    Runs that need a number of ranks of their own make an array of their own. Raises UserError where sbatch cannot
    be called or refuses.
    """
    for ranks in dict.fromkeys(run.ranks for run in runs):
        members = [run for run in runs if run.ranks == ranks]
        tasks = write_tasks(members, folders, name="any" if ranks is None else str(ranks))
        limit = f"%{jobs}" if jobs else ""
        options = [f"--array=0-{len(members) - 1}{limit}", f"--output={folders.root}/slurm-%A_%a.out"]
        if ranks is not None:
            options += ["--nodes=1", f"--export=ALL,RANKS_PER_NODE={ranks}"]
        yield _sbatch([*options, str(SCRIPT), str(tasks)])


def write_tasks(runs: Sequence[Run], folders: Folders, name: str) -> Path:
    """The list that a task of the array takes its line from: config and run folder, with a tab between."""
    lines = [f"{folders.write_config(run).absolute()}\t{folders.begin(run).absolute()}\n" for run in runs]
    path = (folders.root / f"tasks_on_{name}_ranks.tsv").absolute()
    write_text_atomically(path, "".join(lines))
    return path


def _sbatch(arguments: Sequence[str]) -> str:
    if not SCRIPT.is_file():
        raise UserError(f"--launcher slurm: no {SCRIPT} in this folder; run it in a checkout of largebatch")
    try:
        done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--launcher slurm: sbatch cannot be called ({error.strerror}); is Slurm here?") from error
    if done.returncode:
        raise UserError(f"--launcher slurm: sbatch refuses: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
