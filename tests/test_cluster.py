"""Elastic runs on several hosts: whoever leaves, the weights are those of the undisturbed run."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from elastic import give_up_early, kill_agent, start_agent, starts
from hosts import ROOT, Hosts, running_hosts, skip_without, wait_until
from run_folders import DIGITS, call, saved_steps, tensor_hashes

# Checkpoints in the middle of an epoch of 11 steps. Steps are slow until the test has done its worst (`quick`), so that
# the training is long enough for it.
TRAINING = [
    "schedule.epochs=20",
    "schedule.decay.kind=none",
    "schedule.warmup.kind=none",
    "evaluation.every_epochs=20",
    "checkpoint.every_steps=7",
    "execution.timeout_minutes=0.25",
]
STEPS = 20 * 11


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert call("train", DIGITS, "--run-dir", folder, *TRAINING).status == 0
    return tensor_hashes(folder)


class Job:
    """A training, of which each host gets an agent."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.run, self.log, self.quick = folder / "run", folder / "log", folder / "quick"
        self.log.touch()
        self._hosts = hosts

    def start(self, *nodes: str) -> list[subprocess.Popen]:
        command = ("train", DIGITS, "--run-dir", self.run, *TRAINING)
        slow = {"program": [ROOT / "tests/parts/slow_largebatch.py"], "QUICK_FROM": str(self.quick)}
        return [start_agent(self._hosts, node, self.log, *command, **slow) for node in nodes]

    def trains_on(self, ranks: int, timeout: float = 90) -> None:
        """Wait until it has started on so many ranks, and has saved since."""
        wait_until(lambda: starts(self.log)[-1:] == [ranks], f"{ranks} ranks", timeout)
        newest = max(saved_steps(self.run), default=0)
        wait_until(lambda: max(saved_steps(self.run), default=0) > newest, "a checkpoint", 60)


@contextlib.contextmanager
def running_job(folder: Path, count: int) -> Iterator[tuple[Hosts, Job]]:
    """`count` hosts, and a training that is not started; at the end what it has said."""
    with running_hosts(folder / "hosts", count) as hosts:
        job = Job(folder, hosts)
        try:
            yield hosts, job
        finally:
            print(job.log.read_text(errors="replace"))


@pytest.mark.timeout(600)  # the waits are generous: the machine may be busy
def test_a_host_is_lost_in_mid_epoch(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Three hosts; one loses power. The others go on from the last checkpoint, two ranks instead of three."""
    skip_without()
    with running_job(tmp_path, 3) as (hosts, job):
        agents = job.start("node1", "node2", "node3")
        job.trains_on(3)
        hosts.power_off("node3")
        job.quick.touch()
        assert [agent.wait(120) for agent in agents[:2]] == [0, 0]
        assert starts(job.log)[-1] == 2
        assert "resuming from step" in job.log.read_text()
        assert tensor_hashes(job.run) == undisturbed


@pytest.mark.timeout(600)
def test_a_host_leaves_and_is_taken_back(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Two hosts; the agent of the one without the rendezvous is killed, and started again later."""
    skip_without()
    with running_job(tmp_path, 2) as (_, job):
        stays, leaves = job.start("node1", "node2")
        job.trains_on(2)
        kill_agent(leaves)
        job.trains_on(1)
        (back,) = job.start("node2")
        job.trains_on(2)
        assert saved_steps(job.run)[-1] < STEPS, "the training was to go on"
        job.quick.touch()
        assert [agent.wait(120) for agent in (stays, back)] == [0, 0]
        assert tensor_hashes(job.run) == undisturbed


@pytest.mark.timeout(600)
def test_the_host_of_the_rendezvous_is_lost_in_mid_epoch(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Nobody can go on without it: the others stop by themselves. The same command on all goes on."""
    skip_without()
    nodes = ("node1", "node2")
    with running_job(tmp_path, 2) as (hosts, job):
        give_up_early(hosts, *nodes)
        _, other = job.start(*nodes)
        job.trains_on(2)
        hosts.cable("node1", "down")  # first: who loses power closes no connection
        hosts.power_off("node1")
        status, newest = other.wait(90), saved_steps(job.run)[-1]
        before = job.log.read_text()
        hosts.cable("node1", "up")
        job.quick.touch()
        statuses = [agent.wait(120) for agent in job.start(*nodes)]
        after = job.log.read_text().removeprefix(before)
        assert status == 1
        assert "RendezvousConnectionError: The connection to the C10d store has failed" in before
        assert "Run the same command again" in before
        assert newest < STEPS
        assert statuses == [0, 0]
        assert f"resuming from step {newest} of {STEPS}" in after
        assert tensor_hashes(job.run) == undisturbed
