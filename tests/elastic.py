"""torchrun's elastic agents on several hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hosts import Hosts

# A lost agent is noticed after 10 s, and nobody is waited for longer than 5 s: an agent on a busy machine may say
# nothing for some seconds.
RENDEZVOUS = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=10"
VARIABLES = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    # Else a new agent cannot join a job that is running: both wait in vain for MASTER_ADDR.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


# A host that says nothing any more is taken for lost after 6 s. An agent that asks the store of a rendezvous host
# without power waits for the kernel, whose own choice, 15, is a quarter of an hour.
TCP_RETRIES = 4


def give_up_early(hosts: Hosts, *names: str) -> None:
    """Set TCP_RETRIES on these hosts."""
    for name in names:
        hosts.run(name, "sh", "-c", f"echo {TCP_RETRIES} > /proc/sys/net/ipv4/tcp_retries2")


def start_agent(
    hosts: Hosts,
    host: str,
    log: Path,
    *command: str | Path,
    meet_on: str = "node1",
    at_most: int = 3,
    rendezvous: str = RENDEZVOUS,
    program: Sequence[str | Path] = ("-m", "largebatch"),
    **variables: str,
) -> subprocess.Popen:
    """One host's agent of a job of 1 to `at_most` hosts that meet on one of them; runs a largebatch command."""
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nnodes=1:{at_most}", "--nproc-per-node=1"),
        *("--max-restarts=10", "--rdzv-backend=c10d", f"--rdzv-endpoint={meet_on}:29500", "--rdzv-id=test"),
        *(f"--rdzv-conf={rendezvous}", "--monitor-interval=0.2", f"--local-addr={host}", *program),
    ]
    return hosts.start(host, *torchrun, *command, output=log, **VARIABLES, **variables)


def kill_agent(agent: subprocess.Popen) -> None:
    """SIGKILL to torchrun alone: its rank is left without it."""
    torchrun = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()[0]
    os.kill(int(torchrun), signal.SIGKILL)
    agent.wait(30)


def starts(log: Path) -> list[int]:
    """The number of ranks of every start that agents' output tells of."""
    lines = log.read_text(errors="replace").splitlines()
    return [int(line.split()[2].rstrip(",")) for line in lines if line.startswith("ranks N ")]
