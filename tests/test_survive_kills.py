"""Killed at any moment, a run comes to exactly the end that it would have come to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import ROOT, records, saved_steps, tensor_hashes
from survive import Fleet, newest_step, run_to_the_end, training

from largebatch.recipe.draws import uniform
from largebatch.training.checkpoint import CheckpointFolder

CADENCE = 2
OFTEN = [f"checkpoint.every_steps={CADENCE}", "logging.every_steps=1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_to_the_end(1, folder, *OFTEN)
    return folder


def assert_same_end(run_dir: Path, undisturbed: Path) -> None:
    assert tensor_hashes(run_dir) == tensor_hashes(undisturbed)
    assert records(run_dir) == records(undisturbed)


@pytest.mark.parametrize(
    ("moment", "world_size", "victims", "then"),
    [(0, 2, (0,), 3), (1, 3, (2,), 1), (2, 3, (0, 1, 2), 2)],
    ids=["the_main_rank", "another_rank", "all_three"],
)
def test_killed_at_a_random_moment(
    undisturbed: Path, tmp_path: Path, moment: int, world_size: int, victims: tuple[int, ...], then: int
) -> None:
    step, delay = uniform(np.arange(2), 7, moment)
    with Fleet(world_size, *training(tmp_path, *OFTEN)) as fleet:
        fleet.until(lambda: newest_step(tmp_path) >= 1 + int(12 * step))
        time.sleep(0.05 * delay)
        fleet.send(signal.SIGKILL, *victims)
        fleet.outcomes()
    reached, saved = records(tmp_path)[-1]["step"], newest_step(tmp_path)
    # One checkpoint may have been on its way to the disk: the one before it is never lost.
    assert reached - saved <= 2 * CADENCE
    out = run_to_the_end(then, tmp_path, *OFTEN)[0].out
    assert f"resuming from step {saved} of 16" in out or saved in (0, 16)
    assert "damaged" not in out
    assert_same_end(tmp_path, undisturbed)


def _die_in_write(rank: int, step: int, where: str) -> None:
    """Rank 0 is killed while it writes the checkpoint of `step`."""
    if rank != 0:
        return
    save, fsync, replace = CheckpointFolder.save, os.fsync, Path.replace
    here: dict[str, Any] = {"step": -1, "renamed": 0}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_slowly(self: CheckpointFolder, saved: int, data: bytes) -> Path:
        here["step"] = saved
        if saved == step and where == "half of the data":
            (self._folder / f"step_{saved:08d}.tmp").write_bytes(data[: len(data) // 2])
            die()
        return save(self, saved, data)

    def die_after_data(descriptor: int) -> None:
        fsync(descriptor)
        if here["step"] == step and where == "before the rename":
            die()

    def die_after_rename(self: Path, target: Path) -> Path:
        result = replace(self, target)
        if here["step"] == step and str(target).endswith(".pt") and where == "before the manifest":
            die()
        return result

    CheckpointFolder.save = save_slowly  # type: ignore[method-assign]
    os.fsync = die_after_data  # type: ignore[assignment]
    Path.replace = die_after_rename  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("where", ["half of the data", "before the rename", "before the manifest"])
def test_killed_while_a_checkpoint_is_written(undisturbed: Path, tmp_path: Path, where: str) -> None:
    with Fleet(2, *training(tmp_path, *OFTEN), prepare=_die_in_write, prepare_args=(10, where)) as fleet:
        killed, other = fleet.outcomes()
    assert killed.status == -signal.SIGKILL
    assert other.status == 1
    assert "rank 0 died or hung" in other.err
    # Training may have gone on while the checkpoint was written, and never began another.
    assert newest_step(tmp_path) == 8
    out = run_to_the_end(2, tmp_path, *OFTEN)[0].out
    assert "resuming from step 8 of 16" in out
    assert_same_end(tmp_path, undisturbed)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


# ---- torchrun


def torchrun(run_dir: Path, *options: str) -> subprocess.Popen[str]:
    """An agent with two ranks, and a step that takes long enough to hit it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    slow = "checkpoint={every_steps: 1, keep: 3}"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = str(ROOT / "tests/parts/slow_largebatch.py")
    return subprocess.Popen(
        [*command, program, *training(run_dir, slow)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
        cwd=ROOT,
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pids: list[int]) -> list[int]:
    """Those that are processes, and no zombies."""
    found = []
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
            found.append(pid)
    return found


def until(reached: Any, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.01)


def processes_of(run_dir: Path) -> list[int]:
    """All whose command line names this run folder: an agent and its ranks, orphans too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if str(run_dir).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Agents that a test started in its folder; nothing of them outlives it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for pid in processes_of(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for agent in started:
        agent.communicate(timeout=30)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")


@needs_proc
def test_an_agent_restarts_a_killed_rank(
    undisturbed: Path, tmp_path: Path, agents: list[subprocess.Popen[str]]
) -> None:
    agent = torchrun(tmp_path, "--max-restarts=2", "--monitor-interval=0.1")
    agents.append(agent)
    until(lambda: newest_step(tmp_path) >= 4)
    first = children(agent.pid)
    os.kill(first[1], signal.SIGKILL)
    out, _ = agent.communicate(timeout=100)
    assert agent.returncode == 0, out
    assert "resuming from step" in out
    assert tensor_hashes(tmp_path) == tensor_hashes(undisturbed)
    until(lambda: alive(first) == [])


@needs_proc
def test_a_killed_agents_ranks_stop_by_themselves(
    undisturbed: Path, tmp_path: Path, agents: list[subprocess.Popen[str]]
) -> None:
    agent = torchrun(tmp_path)
    agents.append(agent)
    until(lambda: newest_step(tmp_path) >= 4)
    ranks = children(agent.pid)
    assert len(ranks) == 2
    os.kill(agent.pid, signal.SIGKILL)
    agent.wait(timeout=10)
    # At once, while the orphans may still be there: they let go of the folder.
    out = run_to_the_end(3, tmp_path, "checkpoint={every_steps: 1, keep: 3}")[0].out
    until(lambda: alive(ranks) == [])
    assert "resuming from step" in out
    assert tensor_hashes(tmp_path) == tensor_hashes(undisturbed)


@needs_proc
def test_an_agent_told_to_stop_leaves_no_process(
    undisturbed: Path, tmp_path: Path, agents: list[subprocess.Popen[str]]
) -> None:
    agent = torchrun(tmp_path, "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    agents.append(agent)
    until(lambda: newest_step(tmp_path) >= 4)
    ranks = children(agent.pid)
    # Slurm signals every process of a step, so each rank gets it twice: once passed on by the agent.
    for pid in [agent.pid, *ranks]:
        os.kill(pid, signal.SIGUSR1)
    out, _ = agent.communicate(timeout=60)
    assert agent.returncode != 0, "torchrun passes on no status of its ranks, but never 0"
    assert "with a checkpoint" in out
    until(lambda: alive(ranks) == [])
    assert saved_steps(tmp_path)[-1] < 16
    run_to_the_end(1, tmp_path, *OFTEN)
    assert tensor_hashes(tmp_path) == tensor_hashes(undisturbed)
