"""Elastic runs on several hosts: whoever leaves, the weights are those of the undisturbed run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from elastic import give_up_early, start_agent
from hosts import running_hosts, skip_without, wait_until
from run_folders import DIGITS, call, saved_steps, tensor_hashes

# Long enough to lose a host on the way; checkpoints in the middle of an epoch of 11 steps.
TRAINING = [
    "schedule.epochs=10",
    "schedule.decay.kind=none",
    "schedule.warmup.kind=none",
    "evaluation.every_epochs=10",
    "checkpoint.every_steps=7",
    "execution.timeout_minutes=0.25",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert call("train", DIGITS, "--run-dir", folder, *TRAINING).status == 0
    return tensor_hashes(folder)


def test_a_host_is_lost_in_mid_epoch(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Three hosts; one loses power. The others go on from the last checkpoint, two ranks instead of three."""
    skip_without()
    run, logs = tmp_path / "run", [tmp_path / f"log-{number}" for number in (1, 2, 3)]
    with running_hosts(tmp_path / "hosts", 3) as hosts:
        agents = [
            start_agent(hosts, f"node{number}", log, "train", DIGITS, "--run-dir", run, *TRAINING)
            for number, log in enumerate(logs, start=1)
        ]
        try:
            wait_until(lambda: len(saved_steps(run)) > 1, "two checkpoints", 90)
            hosts.power_off("node3")
            statuses = [agent.wait(120) for agent in agents[:2]]
        finally:
            said = "".join(log.read_text() for log in logs)
            print(said)
    assert statuses == [0, 0]
    assert "ranks N             3," in said
    assert "ranks N             2," in said
    assert "going on from step" in said
    assert tensor_hashes(run) == undisturbed


@pytest.mark.timeout(400)  # three waits that are long on a busy machine
def test_the_host_of_the_rendezvous_is_lost_in_mid_epoch(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Nobody can go on without it: the others stop by themselves. The same command on all goes on."""
    skip_without()
    run, log, nodes = tmp_path / "run", tmp_path / "log", ("node1", "node2")
    with running_hosts(tmp_path / "hosts", 2) as hosts:

        def start() -> list[subprocess.Popen]:
            return [start_agent(hosts, node, log, "train", DIGITS, "--run-dir", run, *TRAINING) for node in nodes]

        give_up_early(hosts, *nodes)
        try:
            _, other = start()
            wait_until(lambda: len(saved_steps(run)) > 1, "two checkpoints", 90)
            hosts.cable("node1", "down")  # first: who loses power closes no connection
            hosts.power_off("node1")
            status, newest = other.wait(90), saved_steps(run)[-1]
            before = log.read_text()
            hosts.cable("node1", "up")
            statuses = [agent.wait(90) for agent in start()]
        finally:
            print(log.read_text())
    after = log.read_text().removeprefix(before)
    assert status == 1
    assert "RendezvousConnectionError: The connection to the C10d store has failed" in before
    assert "Start the same command again" in before
    assert newest < 110
    assert statuses == [0, 0]
    assert f"going on from step {newest} of 110" in after
    assert tensor_hashes(run) == undisturbed
