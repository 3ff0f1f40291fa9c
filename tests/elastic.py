"""torchrun's elastic agents on several hosts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hosts import Hosts

# A lost agent is noticed after 3 s, and nobody is waited for longer than 2 s.
RENDEZVOUS = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
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


def start_agent(hosts: Hosts, host: str, log: Path, *command: str | Path, meet_on: str = "node1") -> subprocess.Popen:
    """One host's agent of a job of 1 to 3 hosts that meet on one of them; runs a largebatch command."""
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1", "--max-restarts=10"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={meet_on}:29500", "--rdzv-id=test", f"--rdzv-conf={RENDEZVOUS}"),
        *("--monitor-interval=0.2", f"--local-addr={host}", "-m", "largebatch"),
    ]
    return hosts.start(host, *torchrun, *command, output=log, **VARIABLES)
