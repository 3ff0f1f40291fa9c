"""Elastic runs on several hosts: whoever leaves, the weights are those of the undisturbed run."""

from __future__ import annotations

from pathlib import Path

from elastic import start_agent
from hosts import running_hosts, skip_without, wait_until
from run_folders import DIGITS, call, saved_steps, tensor_hashes

# Long enough to lose a host on the way; checkpoints in the middle of an epoch of 11 steps.
TRAINING = [
    "schedule.epochs=10",
    "schedule.decay.kind=none",
    "schedule.warmup.kind=none",
    "evaluation.every_epochs=10",
    "checkpoint.every_steps=7",
]


def test_a_host_is_lost_in_mid_epoch(tmp_path: Path) -> None:
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
            expected = expected_of(tmp_path / "undisturbed")
            statuses = [agent.wait(120) for agent in agents[:2]]
        finally:
            said = "".join(log.read_text() for log in logs)
            print(said)
    assert statuses == [0, 0]
    assert "ranks N             3," in said
    assert "ranks N             2," in said
    assert "going on from step" in said
    assert tensor_hashes(run) == expected


def expected_of(folder: Path) -> dict[str, str]:
    """The weights of one process that nothing happens to."""
    assert call("train", DIGITS, "--run-dir", folder, *TRAINING).status == 0
    return tensor_hashes(folder)
