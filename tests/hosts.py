"""Several hosts on this machine, made by tests/parts/cluster.sh, as a context: real networks, host names and
processes, of which nothing is left afterwards, however the test ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PARTS = ROOT / "tests/parts"
_REFUSED = 77  # the exit status with which cluster.sh says so
_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def skip_without(*programs: str) -> None:
    """Skip the test, saying why, unless hosts and these programs can be had here."""
    if os.geteuid() != 0:
        pytest.skip("only root can make hosts (network namespaces)")
    for program in ("ip", "nsenter", "unshare", "setpriv", *programs):
        if shutil.which(program, path=_PATH) is None:
            pytest.skip(f"{program} is not installed")


class Hosts:
    """node1, node2 ... and a switch; the folders are common to all."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = environment or {}

    def start(self, host: str, *command: str | Path, output: Path | None = None, **variables: str) -> subprocess.Popen:
        """Start a command on a host; standard output and error go to `output`. Ends with this process."""
        with (output or Path(os.devnull)).open("ab") as sink:
            return subprocess.Popen(
                [_PARTS / "cluster.sh", "on", self.folder, host, *command],
                env=os.environ | self.environment | variables,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )

    def run(self, host: str, *command: str | Path, timeout: float = 60, **variables: str) -> str:
        """Run a command on a host; what it prints. Raises CalledProcessError, TimeoutExpired."""
        done = subprocess.run(
            [_PARTS / "cluster.sh", "on", self.folder, host, *command],
            env=os.environ | self.environment | variables,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{command} on {host}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def cable(self, host: str, state: str) -> None:
        """Pull a host's cable ("down") or put it back ("up")."""
        subprocess.run([_PARTS / "cluster.sh", "cable", self.folder, host, state], check=True, timeout=60)

    def power_off(self, host: str) -> None:
        """End every process of a host at once. Its connections are closed, unless its cable was pulled before."""
        subprocess.run([_PARTS / "cluster.sh", "off", self.folder, host], check=True, timeout=60)


@contextlib.contextmanager
def running_hosts(folder: Path, count: int) -> Iterator[Hosts]:
    """`count` hosts, for as long as the context lasts. Skips the test where the kernel does not let us."""
    script = subprocess.Popen(
        [_PARTS / "cluster.sh", "up", folder, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert script.stdin is not None
    assert script.stdout is not None
    try:
        said = script.stdout.readline()
        if said.strip() != "ready":
            said += script.stdout.read()
            if script.wait(30) == _REFUSED:
                pytest.skip(f"hosts cannot be made here: {said}")
            raise AssertionError(f"the hosts did not start: {said}")
        yield Hosts(folder)
    finally:
        script.stdin.close()  # which ends the script, and with it the hosts
        try:
            script.wait(10)
        finally:
            script.kill()


@contextlib.contextmanager
def running_slurm(folder: Path, count: int) -> Iterator[Hosts]:
    """The same with a Slurm on them; its commands run on the host "switch"."""
    with running_hosts(folder / "hosts", count) as hosts:
        slurm = folder / "slurm"
        started = subprocess.run(
            [_PARTS / "slurm.sh", slurm, hosts.folder],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert started.returncode == 0, started.stderr
        hosts.environment["SLURM_CONF"] = str(slurm / "slurm.conf")
        yield hosts


def wait_until(true: Callable[[], bool], what: str, timeout: float) -> None:
    """Wait until something holds. Raises AssertionError that says `what` did not come."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"after {timeout:g} s still not: {what}"
        time.sleep(0.1)
