"""launch/slurm_benchmark.sbatch and benchmarks/cluster.sh: what they start, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SBATCH, CLUSTER = ROOT / "launch/slurm_benchmark.sbatch", ROOT / "benchmarks/cluster.sh"


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize("script", [SBATCH, CLUSTER])
def test_the_scripts_can_be_executed_and_shellcheck_is_content(script: Path) -> None:
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = _run(["shellcheck", str(script)])
    assert done.returncode == 0, done.stdout


def test_srun_starts_the_benchmark_with_the_jobs_arguments(tmp_path: Path) -> None:
    recorder = tmp_path / "srun"
    recorder.write_text('#!/usr/bin/env bash\necho "$GLOO_SOCKET_IFNAME:" "$@"\n')
    recorder.chmod(0o755)
    done = _run(
        ["bash", str(SBATCH), "config.yaml", "--ranks", "1,8"],
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_ID="7",
        PYTHON="/venv/python",
        INTERFACE="ib0",
    )
    expected = "ib0: --kill-on-bad-exit=1 /venv/python -m largebatch benchmark config.yaml --ranks 1,8"
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["config.yaml"], {}, "runs inside a job"),
        ([], {"SLURM_JOB_ID": "7"}, "give a config"),
        (["config.yaml"], {"SLURM_JOB_ID": "7"}, "set PYTHON"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], variables: dict[str, str], message: str) -> None:
    done = _run(["bash", str(SBATCH), *arguments], **variables)
    assert done.returncode == 2
    assert message in done.stderr


def _needs_hosts() -> None:
    if os.geteuid() != 0 or not (shutil.which("tc") or Path("/sbin/tc").exists()) or not shutil.which("unshare"):
        pytest.skip("needs root, tc (iproute2) and unshare (util-linux)")
    trial = _run([str(CLUSTER), "1", "100mbit", "true"])
    if trial.returncode != 0:
        pytest.skip(f"this machine allows no network namespaces: {trial.stderr.strip()[-200:]}")


def _cluster(*arguments: str) -> subprocess.CompletedProcess[str]:
    _needs_hosts()
    return _run([str(CLUSTER), *arguments])


def test_every_host_has_its_own_name_and_rank() -> None:
    done = _cluster("3", "100mbit", "bash", "-c", "echo $(hostname) $RANK $WORLD_SIZE $LOCAL_WORLD_SIZE")
    assert sorted(done.stdout.splitlines()) == ["host1 0 3 1", "host2 1 3 1", "host3 2 3 1"]


@pytest.mark.timeout(300)
def test_an_exact_sum_sends_what_a_plain_one_does(tmp_path: Path) -> None:
    """benchmarks/host_bytes.py in small: two hosts of two ranks, counted at their interfaces."""
    _needs_hosts()
    out = tmp_path / "bytes.json"
    done = _run(
        [sys.executable, str(ROOT / "benchmarks/host_bytes.py"), "--hosts", "2x2", "--steps", "2", "--width", "12",
         "--json", str(out)]
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    (row,), sent = found["rows"], found["gradient_bytes"]
    # In a ring of four, each rank sends 3/4 of the gradients twice; one of a host's two sends to the other host.
    assert 1.5 * sent < row["fast"]["later"] < 1.7 * sent
    assert 1.8 < row["ratio_first"] < 2.1, "int64"


def test_a_failure_on_one_host_is_the_clusters() -> None:
    assert _cluster("2", "100mbit", "bash", "-c", "exit $((3 * RANK))").returncode == 3


@pytest.mark.timeout(300)
def test_a_step_over_a_slow_link_is_predicted_as_communication(tmp_path: Path) -> None:
    """What a rank of benchmarks/predict_cluster.py measures on two hosts."""
    config = tmp_path / "network.yaml"
    config.write_text(f"extends: {ROOT / 'configs/benchmark/mlp_network.yaml'}\nmodel: {{hidden: [400, 400]}}\n")
    rank = [sys.executable, str(ROOT / "benchmarks/predict_cluster.py"), "--config", str(config), "--rounds", "2"]
    done = _cluster("2", "50mbit", *rank, "--rank", "2", "50mbit", "fast", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert result["ranks_per_node"] == 1
    assert result["measured_network"] == 50e6 / 8
    (measured,) = result["measurements"]
    # 268,410 gradients of 4 bytes cannot pass a link of 50 Mbit/s, less the burst that it lets pass, any sooner.
    gradients = sum(bucket["size"] for bucket in measured["buckets"])
    assert measured["step"] > (gradients - 2 * 131_072) * 8 / 50e6


@pytest.mark.timeout(400)
def test_what_was_not_seen_is_predicted(tmp_path: Path) -> None:
    """benchmarks/predict_cluster.py in small: fitted to two hosts at two rates, asked about three at a third.

    Its limit is wide, for what else this machine does is none of the model's business; a model that knew nothing of
    the rate or of the hosts would be off by more.
    """
    _needs_hosts()
    found = tmp_path / "found.json"
    command = [
        sys.executable, str(ROOT / "benchmarks/predict_cluster.py"), "--reduction", "fast", "--rounds", "2",
        "--seen-hosts", "2", "--unseen-hosts", "3", "--limit", "0.4", "--json", str(found),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(found.read_text())
    assert result["algorithm"] == "ring"
    assert result["parameters"]["network_overhead"] > 0
    assert result["predicted"]["exposed_communication"] > 0
