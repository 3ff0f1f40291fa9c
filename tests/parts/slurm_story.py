"""Trainings under a real Slurm of two nodes on this machine, started and stopped in every way; their weights are
compared with those of one process that nothing happened to.

    python tests/parts/slurm_story.py results/survive/slurm.json

Takes about ten minutes on two cores, most of it waiting for Slurm. Needs root and the Debian packages of .ci/run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from hosts import Hosts, running_slurm, wait_until
from run_folders import DIGITS, saved_steps, tensor_hashes
from test_slurm import LONG, SHORT, finish, one_process, submit

from largebatch.report.environment import describe_environment
from largebatch.report.files import write_json_atomically

LIMIT = ["--time=1", "--signal=B:USR1@15"]
LONGER = [*LONG, "schedule.epochs=60", "evaluation.every_epochs=60"]
LOSABLE = [*LONG, "schedule.epochs=40", "evaluation.every_epochs=40", "checkpoint.every_steps=20"]
ENVIRONMENT = ("started", "command", "platform", "python", "packages", "cpu", "git")


class Story:
    """What has been run so far, each in a folder of its own."""

    def __init__(self, folder: Path, slurm: Hosts) -> None:
        self.folder = folder
        self.slurm = slurm
        self.events: list[dict[str, Any]] = []

    def happens(self, what: str, training: list[str], do: Callable[[Path], tuple[str, list[Path]]]) -> None:
        """Do it in a new folder, which gives what was said and the run folders, and compare these."""
        folder = self.folder / str(len(self.events))
        folder.mkdir()
        begun = time.monotonic()
        said, runs = do(folder)
        seconds = round(time.monotonic() - begun)
        expected = one_process(folder / "undisturbed", *training)
        self.events.append(
            {
                "event": what,
                "starts": said.count("slurm.sbatch: job"),
                "steps_gone_on_from": [int(rest.split()[0]) for rest in said.split("resuming from step ")[1:]],
                "identical": all(tensor_hashes(run) == expected for run in runs),
                "seconds": seconds,
            }
        )
        print(self.events[-1], flush=True)

    def two_nodes(self, folder: Path) -> tuple[str, list[Path]]:
        run = folder / "run"
        return finish(self.slurm, self.submit(folder, [], run, SHORT), folder / "log"), [run]

    def srun_alone(self, folder: Path) -> tuple[str, list[Path]]:
        run = folder / "run"
        command = [sys.executable, "-m", "largebatch", "train", DIGITS, "--run-dir", run, *SHORT]
        return self.slurm.run("switch", "srun", "--nodes=2", "--ntasks=3", *command, timeout=180), [run]

    def signal_to_a_task_of_an_array(self, folder: Path) -> tuple[str, list[Path]]:
        log, runs = folder / "log-%a", [folder / "run-0", folder / "run-1"]
        job = submit(self.slurm, log, ["--array=0-1", "--nodes=1"], "--run-dir", f"{folder}/run-%a", *LONG)
        wait_until(lambda: _has_trained(runs[1]), "a training", 120)
        self.slurm.run("switch", "scancel", "--signal=USR1", f"{job}_1")
        return finish(self.slurm, job, log, 300), runs

    def out_of_time(self, folder: Path) -> tuple[str, list[Path]]:
        run = folder / "run"
        return finish(self.slurm, self.submit(folder, LIMIT, run, LONGER), folder / "log", 900), [run]

    def a_node_goes_down(self, folder: Path) -> tuple[str, list[Path]]:
        run = folder / "run"
        job = self.submit(folder, [], run, LOSABLE)
        wait_until(lambda: len(saved_steps(run)) > 1, "two checkpoints", 120)
        self.slurm.run("switch", "scontrol", "update", "nodename=node2", "state=down", "reason=story")
        time.sleep(5)
        self.slurm.run("switch", "scontrol", "update", "nodename=node2", "state=resume")
        return finish(self.slurm, job, folder / "log", 600), [run]

    def submit(self, folder: Path, options: list[str], run: Path, training: list[str]) -> str:
        return submit(self.slurm, folder / "log", options, "--run-dir", run, *training)


def _has_trained(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, running_slurm(Path(folder) / "cluster", 2) as slurm:
        story = Story(Path(folder), slurm)
        story.happens("two nodes under torchrun", SHORT, story.two_nodes)
        story.happens("srun alone, 2 tasks on one node and 1 on the other", SHORT, story.srun_alone)
        story.happens("scancel --signal to one task of an array", LONG, story.signal_to_a_task_of_an_array)
        story.happens("a node goes down and comes back", LOSABLE, story.a_node_goes_down)
        story.happens(f"out of time, {' '.join(LIMIT)}", LONGER, story.out_of_time)
        environment = describe_environment()
        result = {
            "environment": {key: environment[key] for key in ENVIRONMENT},
            "slurm": slurm.run("switch", "sinfo", "--version").strip(),
            "events": story.events,
        }
    write_json_atomically(Path(sys.argv[1]), result)
    sys.exit(not all(event["identical"] for event in story.events))


if __name__ == "__main__":
    main()
