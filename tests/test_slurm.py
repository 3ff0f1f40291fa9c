"""Runs under a real Slurm of two nodes: however they are started and stopped, the weights are those of one process."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import ROOT, Hosts, running_slurm, skip_without, wait_until
from run_folders import DIGITS, call, tensor_hashes

from largebatch.distributed.environment import read_launch, tasks_by_node
from largebatch.errors import UserError

SHORT = ["schedule.epochs=2", "schedule.decay.kind=none", "schedule.warmup.kind=none"]
# Long enough to be stopped, and without checkpoints but that of a stop: what is gone on from is what it saved.
LONG = ["schedule.epochs=8", *SHORT[1:], "evaluation.every_epochs=8", "checkpoint.every_epochs=null"]
SETTINGS = {"PYTHON": sys.executable, "RANKS_PER_NODE": "1"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    skip_without("slurmctld", "slurmd", "munged", "sbatch", "srun")
    with running_slurm(tmp_path_factory.mktemp("cluster"), 2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return one_process(tmp_path_factory.mktemp("undisturbed"), *SHORT)


def one_process(folder: Path, *overrides: str) -> dict[str, str]:
    assert call("train", DIGITS, "--run-dir", folder, *overrides).status == 0
    return tensor_hashes(folder)


def submit(slurm: Hosts, log: Path, options: list[str], *arguments: str | Path) -> str:
    """sbatch launch/slurm.sbatch train configs/digits.yaml ...; the job's number."""
    command = ["sbatch", "--parsable", f"--output={log}", *options, ROOT / "launch/slurm.sbatch"]
    return slurm.run("switch", *command, "train", DIGITS, *arguments, **SETTINGS).strip()


def states(slurm: Hosts, job: str) -> list[str]:
    shown = slurm.run("switch", "scontrol", "--oneliner", "show", "job", job).split()
    return [word.removeprefix("JobState=") for word in shown if word.startswith("JobState=")]


def finish(slurm: Hosts, job: str, log: Path, timeout: float = 120) -> str:
    """Wait for a job's end, which must be a good one; its output."""
    running = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
    try:
        wait_until(lambda: not running & set(states(slurm, job)), f"the end of job {job}", timeout)
    finally:
        slurm.run("switch", "scancel", job)
        said = "".join(path.read_text() for path in sorted(log.parent.glob(log.name.replace("%a", "*"))))
        print(said)
    assert set(states(slurm, job)) == {"COMPLETED"}
    return said


def test_two_nodes_under_torchrun(slurm: Hosts, undisturbed: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    said = finish(slurm, submit(slurm, log, [], "--run-dir", tmp_path / "run", *SHORT), log)
    assert "2 nodes of 1 ranks, meeting at node1:" in said
    assert "ranks N             2," in said
    assert tensor_hashes(tmp_path / "run") == undisturbed


def test_srun_alone_with_different_numbers_of_tasks_on_its_nodes(
    slurm: Hosts, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "largebatch", "train", DIGITS, "--run-dir", tmp_path / "run", *SHORT]
    said = slurm.run("switch", "srun", "--nodes=2", "--ntasks=3", *command, timeout=120)
    assert "ranks N             3," in said
    assert tensor_hashes(tmp_path / "run") == undisturbed


def test_an_array_and_a_signal_to_one_of_its_tasks(slurm: Hosts, tmp_path: Path) -> None:
    """Task 1 is told by `scancel --signal`, saves, is requeued and goes on; task 0 notices nothing."""
    log = tmp_path / "log-%a"
    job = submit(slurm, log, ["--array=0-1", "--nodes=1"], "--run-dir", f"{tmp_path}/run-%a", *LONG)
    metrics = tmp_path / "run-1/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, "a training that is on its way", 60)
    slurm.run("switch", "scancel", "--signal=USR1", f"{job}_1")
    expected = one_process(tmp_path / "undisturbed", *LONG)
    finish(slurm, job, log)
    assert "requesting a requeue" in (tmp_path / "log-1").read_text()
    assert "resuming from step" in (tmp_path / "log-1").read_text()
    assert "requeued" not in (tmp_path / "log-0").read_text()
    assert tensor_hashes(tmp_path / "run-0") == expected
    assert tensor_hashes(tmp_path / "run-1") == expected


def test_a_stop_without_a_checkpoint_is_not_requeued(slurm: Hosts, tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    job = submit(slurm, log, [], "--run-dir", run, *LONG, "schedule.epochs=1000")
    wait_until(lambda: (run / "metrics.jsonl").exists(), "a training", 60)
    with contextlib.suppress(FileNotFoundError):
        (run / "checkpoints").rename(run / "elsewhere")
    (run / "checkpoints").touch()  # where no folder can be made
    slurm.run("switch", "scancel", "--signal=USR1", job)
    try:
        wait_until(lambda: states(slurm, job) == ["FAILED"], "the end of the job", 60)
    finally:
        slurm.run("switch", "scancel", job)
        print(log.read_text())
    assert "a checkpoint could not be written" in log.read_text()
    assert "requeued" not in log.read_text()
    assert "ExitCode=2:0" in slurm.run("switch", "scontrol", "show", "job", job)


@pytest.mark.timeout(600)
def test_out_of_time(slurm: Hosts, tmp_path: Path) -> None:
    """Slurm's own signal before the time limit, which it looks at each 30 s: so this takes a minute or two."""
    if "LONG_TESTS" not in os.environ:
        pytest.skip("takes minutes; run it with LONG_TESTS=1")
    log = tmp_path / "log"
    longer = [*LONG, "schedule.epochs=60", "evaluation.every_epochs=60"]
    job = submit(slurm, log, ["--time=1", "--signal=B:USR1@15"], "--run-dir", tmp_path / "run", *longer)
    expected = one_process(tmp_path / "undisturbed", *longer)
    said = finish(slurm, job, log, timeout=500)
    assert "requesting a requeue" in said
    assert "resuming from step" in said
    assert tensor_hashes(tmp_path / "run") == expected


def test_a_node_without_the_interpreter_ends_the_job_at_once(slurm: Hosts, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["sbatch", "--parsable", f"--output={log}", ROOT / "launch/slurm.sbatch", "train", DIGITS]
    job = slurm.run("switch", *command, **(SETTINGS | {"PYTHON": "/nowhere/python"})).strip()
    wait_until(lambda: states(slurm, job) == ["FAILED"], "the end of the job", 60)
    assert "PYTHON=/nowhere/python is not a program here" in log.read_text()


def test_the_benchmark_over_two_nodes(slurm: Hosts, tmp_path: Path) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "run"
    config = ROOT / "configs/benchmark/mlp_network.yaml"
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={log}"]
    arguments = ["--ranks", "1,2", "--rounds", "2", "--run-dir", run_dir, "--measured-network", "1gbit"]
    command = ["sbatch", "--parsable", *options, ROOT / "launch/slurm_benchmark.sbatch", config, *arguments]
    finish(slurm, slurm.run("switch", *command, PYTHON=sys.executable).strip(), log)
    found = json.loads((run_dir / "benchmark.json").read_text())
    assert [(m["world_size"], m["ddp"]) for m in found["measurements"]] == [(1, False), (1, True), (2, True)]
    assert found["ranks_per_node"] == 1
    assert (run_dir / "throughput.png").exists()


class TestVariables:
    """What srun says of a step, without a Slurm."""

    @pytest.mark.parametrize(
        ("text", "counts"), [("1", [1]), ("2(x3)", [2, 2, 2]), ("2(x2),1", [2, 2, 1]), ("4,2(x2),8", [4, 2, 2, 8])]
    )
    def test_tasks_of_each_node(self, text: str, counts: list[int]) -> None:
        assert tasks_by_node(text) == counts

    @pytest.mark.parametrize("text", ["", "two", "2(x", "2(x2)3", "-1"])
    def test_counts_that_are_none(self, text: str) -> None:
        with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE"):
            tasks_by_node(text)

    def test_a_rank_knows_its_own_node(self) -> None:
        step = {
            "SLURM_JOB_ID": "12",
            "SLURM_STEP_NODELIST": "gpu[08-09]",
            "SLURM_STEP_NUM_TASKS": "5",
            "SLURM_STEP_TASKS_PER_NODE": "3,2",
        }
        ranks = [("0", "0", "0"), ("2", "2", "0"), ("3", "0", "1"), ("4", "1", "1")]
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
        launches = [read_launch(step | dict(zip(names, rank, strict=True))) for rank in ranks]
        assert [launch.rank for launch in launches] == [0, 2, 3, 4]
        assert [launch.local_world_size for launch in launches] == [3, 3, 2, 2]
        assert {launch.init_method for launch in launches} == {"tcp://gpu08:20012"}
