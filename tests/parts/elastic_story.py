"""One training on three hosts of this machine, on which all goes wrong, one after another; then its weights are
compared with those of one process that nothing happened to.

    python tests/parts/elastic_story.py results/survive/elastic.json

Takes about four minutes on two cores. Needs root.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from elastic import TCP_RETRIES, give_up_early, kill_agent, start_agent, starts
from hosts import Hosts, running_hosts, wait_until
from run_folders import DIGITS, saved_steps, tensor_hashes

# With nothing else on the machine: a lost agent is noticed after 3 s, and nobody is waited for longer than 2 s.
RENDEZVOUS = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
TRAINING = [
    "schedule.epochs=120",
    "schedule.decay.kind=none",
    "schedule.warmup.kind=none",
    "evaluation.every_epochs=120",
    "checkpoint.every_steps=20",
    "execution.timeout_minutes=0.25",
]


class Story:
    """The hosts, their agents, and what has happened so far."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.run = folder / "run"
        self.log = folder / "log"
        self.log.touch()
        self.hosts = hosts
        self.agents: dict[str, subprocess.Popen] = {}
        self.events: list[dict[str, object]] = []

    def start(self, *hosts: str, meet_on: str = "node1") -> None:
        command = ("train", DIGITS, "--run-dir", self.run, *TRAINING)
        self.agents |= {
            host: start_agent(self.hosts, host, self.log, *command, meet_on=meet_on, rendezvous=RENDEZVOUS)
            for host in hosts
        }

    def happens(self, what: str, do: Callable[[], None], ranks: int) -> None:
        """Do it, and wait until the training goes on with so many ranks and has saved again."""
        before, earlier, begun = max(saved_steps(self.run), default=0), starts(self.log), time.monotonic()
        do()
        wait_until(lambda: starts(self.log)[len(earlier) :][-1:] == [ranks], f"{what}: {ranks} ranks", 180)
        seconds = time.monotonic() - begun
        wait_until(lambda: max(saved_steps(self.run), default=0) > before + 40, f"{what}: training", 180)
        self.events.append(
            {"event": what, "step": before, "ranks_after": ranks, "seconds_until_training_goes_on": round(seconds, 1)}
        )
        print(self.events[-1], flush=True)

    def lose_the_rendezvous(self) -> None:
        """node1 loses power, and closes no connection: wait until the other agents have stopped by themselves."""
        begun = time.monotonic()
        self.hosts.cable("node1", "down")
        self.hosts.power_off("node1")
        left = [host for host, agent in self.agents.items() if agent.poll() is None and host != "node1"]
        statuses = [self.agents[host].wait(180) for host in left]
        seconds = round(time.monotonic() - begun, 1)
        said = [
            line for line in self.log.read_text(errors="replace").splitlines() if "RendezvousConnectionError:" in line
        ]
        self.events.append(
            {
                "event": "node1, which runs the rendezvous, loses power: the others stop by themselves",
                "step": max(saved_steps(self.run)),
                "status_of_the_agents": statuses,
                "seconds_until_they_have_stopped": seconds,
                "last_words": said[-1],
            }
        )
        print(self.events[-1], flush=True)


def tell(story: Story) -> None:
    """All that happens, to the end of the training."""
    nodes = ("node1", "node2", "node3")
    give_up_early(story.hosts, *nodes)
    story.happens("three hosts start", lambda: story.start(*nodes), 3)
    story.happens("the agent of node3 is killed", lambda: kill_agent(story.agents["node3"]), 2)
    story.happens("node3 returns", lambda: story.start("node3"), 3)
    story.happens("the cable of node2 is pulled", lambda: story.hosts.cable("node2", "down"), 2)
    story.events[-1]["status_of_its_agent"] = story.agents["node2"].wait(60)
    story.hosts.cable("node2", "up")
    story.happens("node2 returns", lambda: story.start("node2"), 3)
    story.happens("node3 loses power", lambda: story.hosts.power_off("node3"), 2)
    story.lose_the_rendezvous()
    left = nodes[1:]
    story.happens("started again on node2 and node3, to meet on node2", lambda: story.start(*left, meet_on="node2"), 2)
    story.hosts.cable("node1", "up")
    story.happens("node1 returns, and meets them there", lambda: story.start("node1", meet_on="node2"), 3)
    wait_until((story.run / "summary.json").exists, "the end of the training", 300)
    statuses = [story.agents[host].wait(60) for host in nodes]
    story.events.append({"event": "the training ends", "status_of_the_agents": statuses})


def main(output: Path) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with running_hosts(folder / "hosts", 3) as hosts:
            story = Story(folder, hosts)
            try:
                tell(story)
            except BaseException:
                print(story.log.read_text(errors="replace")[-20000:])
                raise
        alone = [sys.executable, "-m", "largebatch", "train", DIGITS, "--run-dir", str(folder / "alone"), *TRAINING]
        subprocess.run(alone, check=True, timeout=600, stdout=subprocess.DEVNULL)
        same = tensor_hashes(story.run) == tensor_hashes(folder / "alone")
    result = {
        "command": "python tests/parts/elastic_story.py",
        "torch": torch.__version__,
        "config": ["configs/digits.yaml", *TRAINING],
        "torchrun": f"--rdzv-conf={RENDEZVOUS}",
        "kernel": f"net.ipv4.tcp_retries2={TCP_RETRIES}",
        "events": story.events,
        "weights_bit_identical_to_one_undisturbed_process": same,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
