"""The launch scripts' own decisions: what they start, and what they refuse.

The programs that they call are recorded, not run: stand-ins on PATH write down how they were called.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from largebatch.cli import main

ROOT = Path(__file__).parents[1]
SCRIPTS = [".ci/run", "launch/torchrun.sh", "launch/slurm.sbatch", "tests/parts/cluster.sh", "tests/parts/slurm.sh"]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder at the head of PATH for stand-ins."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def add_program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


def call(programs: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", "/"),
        **variables,
    }
    command = ["bash", str(ROOT / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_is_content(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", ROOT / script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_can_be_executed(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


class TestTorchrun:
    """launch/torchrun.sh, with an interpreter that prints its arguments."""

    @pytest.fixture(autouse=True)
    def interpreter(self, programs: Path) -> None:
        add_program(programs, "recorder", '[ "$1" = -c ] || echo "$OMP_NUM_THREADS:" "$@"')

    def run(self, programs: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return call(programs, "launch/torchrun.sh", *arguments, PYTHON="recorder", **variables)

    def ranks(self, programs: Path, **variables: str) -> str:
        done = self.run(programs, "plan", "x.yaml", **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.partition("--nproc-per-node=")[2].split()[0]

    def test_arguments_arrive_whole(self, programs: Path) -> None:
        done = self.run(programs, "train", "a b.yaml", "schedule.epochs=2", RANKS="3")
        assert done.stdout == (
            "1: -m torch.distributed.run --standalone --nproc-per-node=3 -m largebatch"
            " train a b.yaml schedule.epochs=2\n"
        )

    def test_gloo_does_not_listen_to_the_network_unless_told_to(self, programs: Path) -> None:
        add_program(programs, "recorder", '[ "$1" = -c ] || echo "$GLOO_SOCKET_IFNAME"')
        assert self.run(programs, "train", "x", RANKS="2").stdout == "lo\n"
        assert self.run(programs, "train", "x", RANKS="2", GLOO_SOCKET_IFNAME="eth1").stdout == "eth1\n"

    def test_one_rank_per_gpu(self, programs: Path) -> None:
        gpus = r"printf 'GPU 0: H (UUID: GPU-1)\nGPU 1: H (UUID: GPU-2)\n'"
        add_program(programs, "nvidia-smi", gpus)
        assert self.ranks(programs) == "2"
        assert self.ranks(programs, RANKS="5") == "5"
        assert self.ranks(programs, CUDA_VISIBLE_DEVICES="0,1,6") == "3"

    def test_without_gpus_one_rank_per_core(self, programs: Path) -> None:
        add_program(programs, "nproc", "echo 6")
        add_program(programs, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
        assert self.ranks(programs) == "6"
        assert self.ranks(programs, CUDA_VISIBLE_DEVICES="") == "6"
        assert self.ranks(programs, CUDA_VISIBLE_DEVICES="-1") == "6"

    @pytest.mark.parametrize("ranks", ["0", "-1", "two", "1.5"])
    def test_ranks_that_are_no_count(self, programs: Path, ranks: str) -> None:
        done = self.run(programs, "train", "x.yaml", RANKS=ranks)
        assert done.returncode == 2
        assert f"RANKS={ranks} must be" in done.stderr

    def test_nothing_to_run(self, programs: Path) -> None:
        done = self.run(programs)
        assert done.returncode == 2
        assert "give a command" in done.stderr

    def test_an_interpreter_without_the_package(self, programs: Path) -> None:
        add_program(programs, "bare", "exit 1")
        done = call(programs, "launch/torchrun.sh", "train", "x.yaml", PYTHON="bare", RANKS="1")
        assert done.returncode == 2
        assert "bare has no torch or no largebatch" in done.stderr


def test_a_command_leaves_its_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For launch/slurm.sbatch, since torchrun hides it."""
    monkeypatch.setenv("LARGEBATCH_STATUS_FILE", str(tmp_path / "status"))
    assert main(["config", "schema"]) == 0
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", str(tmp_path / "missing.yaml")]) == 2
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"status.0": "0\n", "status.3": "2\n"}
    monkeypatch.setenv("LARGEBATCH_STATUS_FILE", "/nowhere/status")
    assert main(["train", str(tmp_path / "missing.yaml")]) == 2


# An srun that runs one node's part: what follows its options, as Slurm would start it on the first node.
SRUN = """
echo "srun" "$@" | head -n 1
while [ "$1" != bash ]; do shift; done
SLURMD_NODENAME=gpu1 SLURM_NODEID=0 exec "$@"
"""


class TestSlurm:
    """launch/slurm.sbatch, with Slurm's programs recorded, and an interpreter that prints its arguments."""

    @pytest.fixture(autouse=True)
    def slurm(self, programs: Path) -> None:
        names = 'for i in {1..3000}; do echo "gpu$i"; done'  # more than a pipe holds: nothing may break on it
        add_program(programs, "scontrol", f'[ "$1 $2" = "show hostnames" ] && {{ {names}; }} || echo "scontrol $*"')
        add_program(programs, "srun", SRUN)
        add_program(programs, "recorder", 'echo "torchrun" "$@"')
        add_program(programs, "sleep", "exec /bin/sleep 0.01")

    def run(self, programs: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        job = {
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "gpu[1-3000]",
            "SLURM_NNODES": "3000",
            "SLURM_GPUS_ON_NODE": "8",
            "PYTHON": "recorder",
        }
        return call(programs, "launch/slurm.sbatch", *arguments, **(job | variables))

    def test_one_agent_per_node_that_meet_on_the_first(self, programs: Path) -> None:
        done = self.run(programs, "train", "a b.yaml")
        assert done.returncode == 0, done.stderr
        _, srun, torchrun = done.stdout.splitlines()
        assert "--kill-on-bad-exit=1" in srun
        assert "--ntasks=3000" in srun
        for part in (
            "--nnodes=3000",
            "--nproc-per-node=8",
            "--rdzv-endpoint=gpu1:23456",
            "--rdzv-id=123456-0",
            "--local-addr=gpu1",
        ):
            assert part in torchrun.split()
        assert torchrun.endswith("-m largebatch train a b.yaml")
        assert "localhost" not in torchrun

    def test_a_requeued_job_meets_under_an_id_of_its_own(self, programs: Path) -> None:
        assert "--rdzv-id=123456-2" in self.run(programs, "train", "x", SLURM_RESTART_COUNT="2").stdout

    def test_a_task_of_an_array_puts_its_number_into_the_arguments(self, programs: Path) -> None:
        done = self.run(programs, "train", "x", "seed=%a", "--run-dir", "x-%a", SLURM_ARRAY_TASK_ID="7")
        assert done.stdout.endswith("train x seed=7 --run-dir x-7\n")

    def test_the_interface_is_passed_on(self, programs: Path) -> None:
        add_program(programs, "recorder", 'echo "$NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME"')
        assert self.run(programs, "train", "x", INTERFACE="ib0").stdout.endswith("ib0 ib0\n")

    def test_the_status_is_that_of_torchrun(self, programs: Path) -> None:
        add_program(programs, "recorder", "exit 7")
        done = self.run(programs, "train", "x")
        assert done.returncode == 7
        assert "requeue" not in done.stdout

    def test_out_of_time_stops_the_ranks_and_requeues(self, programs: Path) -> None:
        """Only the script gets the signal: it tells srun, waits for it, and asks for a requeue."""
        add_program(
            programs,
            "srun",
            "trap 'echo srun told; sleep 0.5; echo srun saved; exit 75' USR1; kill -USR1 $PPID; "
            "for _ in {1..1000}; do sleep 0.1; done",
        )
        done = self.run(programs, "train", "x")
        told, saved, says, requeued = done.stdout.splitlines()[1:]
        assert (told, saved, requeued) == ("srun told", "srun saved", "scontrol requeue 123456")
        assert "requesting a requeue" in says
        assert done.returncode == 75

    def test_an_srun_that_the_signal_ends_before_it_can_pass_it_on_requeues(self, programs: Path) -> None:
        add_program(programs, "srun", "kill -USR1 $PPID; for _ in {1..1000}; do sleep 0.1; done")
        done = self.run(programs, "train", "x")
        assert done.returncode == 75
        assert "scontrol requeue 123456" in done.stdout

    @pytest.mark.parametrize("status", [2, 3, 1])
    def test_out_of_time_without_a_checkpoint_does_not_requeue(self, programs: Path, status: int) -> None:
        waits = f"trap 'exit {status}' USR1; kill -USR1 $PPID; for _ in {{1..1000}}; do sleep 0.1; done"
        add_program(programs, "srun", waits)
        done = self.run(programs, "train", "x")
        assert done.returncode == status
        assert "requeue" not in done.stdout

    @pytest.mark.parametrize(
        ("ranks", "status"),
        [
            (["75", "75"], 75),
            (["75"], 75),  # the other was lost, after its checkpoint
            ([], 75),  # ended by the signal, while they started
            (["2", "2"], 2),
            (["3", "3"], 3),
            (["1", "2"], 2),
            (["1", "1"], 1),
        ],
    )
    def test_ranks_that_are_told_by_themselves_say_whether_it_is_requeued(
        self, programs: Path, tmp_path: Path, ranks: list[str], status: int
    ) -> None:
        """scancel --signal=USR1 tells the step and not the script; torchrun exits with 1 whatever its ranks did."""
        say = "".join(f'echo {said} >"$LARGEBATCH_STATUS_FILE.{rank}"; ' for rank, said in enumerate(ranks))
        note = f'echo "${{LARGEBATCH_STATUS_FILE%/*}}" >"{tmp_path}/folder"; '
        waits = "kill -USR1 $PPID $$; for _ in {1..1000}; do sleep 0.1; done"
        add_program(programs, "recorder", f"trap '{note}{say}exit 1' USR1; {waits}")
        done = self.run(programs, "train", "x")
        assert done.returncode == status, done.stderr
        assert ("scontrol requeue 123456" in done.stdout) == (status == 75)
        assert not Path((tmp_path / "folder").read_text().strip()).exists()

    def test_a_run_that_ends_well_out_of_time_is_not_requeued(self, programs: Path) -> None:
        add_program(programs, "srun", "trap 'exit 0' USR1; kill -USR1 $PPID; while :; do sleep 0.1; done")
        done = self.run(programs, "train", "x")
        assert done.returncode == 0
        assert "requeue" not in done.stdout

    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            ({"SLURM_JOB_ID": ""}, "runs inside a job"),
            ({"PYTHON": ""}, "set PYTHON"),
            ({"PYTHON": "/nowhere/python"}, "gpu1: PYTHON=/nowhere/python is not a program here"),
            ({"SLURM_GPUS_ON_NODE": ""}, "RANKS_PER_NODE=''"),
            ({"RANKS_PER_NODE": "all"}, "RANKS_PER_NODE='all'"),
        ],
    )
    def test_a_setting_that_is_missing(self, programs: Path, missing: dict[str, str], message: str) -> None:
        done = self.run(programs, "train", "x", **missing)
        assert done.returncode == 2
        assert message in done.stderr
        assert "torchrun" not in done.stdout

    @pytest.mark.parametrize(
        ("hosts", "variables", "message"),
        [
            ("exit 2", {}, "cannot resolve the name gpu1"),
            ('echo "127.0.1.1 $2"', {}, "gpu1 is 127.0.1.1 here, so this node would wait for itself"),
            ('[ "$2" = gpu1 ] && echo 10.0.0.1 || echo 127.0.1.1', {}, "other is 127.0.1.1 here"),
            ('[ "$2" = gpu1 ] && echo 10.0.0.1 || echo 127.0.1.1', {"INTERFACE": "eth0"}, ""),
            ('echo "10.0.0.1 $2"', {}, ""),
        ],
    )
    def test_a_node_that_would_wait_for_itself(
        self, programs: Path, hosts: str, variables: dict[str, str], message: str
    ) -> None:
        """On another machine than the first node's, names must lead out of it."""
        add_program(programs, "getent", hosts)
        add_program(
            programs, "uname", f'[ -e "{programs}/second" ] && echo other || {{ : >"{programs}/second"; echo gpu1; }}'
        )
        done = self.run(programs, "train", "x", **variables)
        assert done.returncode == (2 if message else 0)
        assert message in done.stderr

    def test_no_node_names(self, programs: Path) -> None:
        add_program(programs, "scontrol", "exit 1")
        done = self.run(programs, "train", "x")
        assert done.returncode == 2
        assert "names no node" in done.stderr

    def test_nothing_to_run(self, programs: Path) -> None:
        assert "give a command" in self.run(programs).stderr
