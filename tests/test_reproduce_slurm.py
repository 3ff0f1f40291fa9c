"""`reproduce run --launcher slurm` and the array's script, with programs that record how they were called."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from run_folders import ROOT, call

SCRIPT = ROOT / "launch/slurm_array.sbatch"
EXPERIMENT = ROOT / "configs/reproduce/accumulation.yaml"


def add_program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in for sbatch writes its arguments, a line a call."""
    calls = tmp_path / "calls"
    add_program(tmp_path / "bin/sbatch", f'echo "$*" >> {calls}; echo "Submitted batch job 7"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return calls


def test_every_run_is_a_task_of_an_array(sbatch: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("reproduce", "run", EXPERIMENT, "--out", out, "--launcher", "slurm", "--jobs", "4")
    assert done.status == 0, done.err
    assert done.out.count("submitted: Submitted batch job 7") == 3
    arrays = sbatch.read_text().splitlines()
    # The rows of the experiment run on 1, 2, 3, 1 and 2 ranks, each with two seeds.
    for ranks, tasks, line in zip((1, 2, 3), (4, 4, 2), arrays, strict=True):
        listed = out / f"smoke/tasks_on_{ranks}_ranks.tsv"
        assert f"--array=0-{tasks - 1}%4" in line
        assert f"--nodes=1 --export=ALL,RANKS_PER_NODE={ranks}" in line
        assert line.endswith(f"launch/slurm_array.sbatch {listed}")
        rows = [row.split("\t") for row in listed.read_text().splitlines()]
        assert len(rows) == tasks
        for config, folder in rows:
            assert call("config", "show", config).status == 0
            assert Path(folder).is_dir()
            assert Path(folder).name == Path(config).stem


def test_a_refusal_and_a_missing_slurm_are_told(sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["reproduce", "run", EXPERIMENT, "--out", tmp_path / "out", "--launcher"]
    add_program(tmp_path / "bin/sbatch", "echo 'Invalid account' >&2; exit 1")
    refused = call(*asked, "slurm")
    assert (refused.status, refused.err) == (2, "--launcher slurm: sbatch refuses: Invalid account\n")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    missing = call(*asked, "slurm")
    assert missing.status == 2
    assert "sbatch cannot be called" in missing.err
    assert "--launcher: 'cluster' is not one of local, slurm" in call(*asked, "cluster").err


class TestScript:
    """launch/slurm_array.sbatch, above a stand-in for launch/slurm.sbatch."""

    def run(self, tmp_path: Path, launcher: str, task: str | None = "1") -> subprocess.CompletedProcess[str]:
        add_program(tmp_path / "launch/slurm.sbatch", launcher)
        (tmp_path / "run b").mkdir(exist_ok=True)
        (tmp_path / "tasks.tsv").write_text(f"a.yaml\t{tmp_path}/run a\nb c.yaml\t{tmp_path}/run b\n")
        variables = {"PATH": os.environ["PATH"]} | ({"SLURM_ARRAY_TASK_ID": task} if task else {})
        return subprocess.run(
            ["bash", SCRIPT, "tasks.tsv"], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )

    def test_a_task_trains_its_own_line(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, 'printf "%s|" "$@"')
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run b/log.txt").read_text() == f"train|b c.yaml|--run-dir|{tmp_path}/run b|"
        assert not (tmp_path / "run b/outcome.json").exists()

    @pytest.mark.parametrize(
        ("says", "status", "state"),
        [("step 3: not finite: the loss", 1, "diverged"), ("no such file", 2, "failed"), ("preempted", 75, None)],
    )
    def test_how_a_run_ended_is_noted(self, tmp_path: Path, says: str, status: int, state: str | None) -> None:
        assert self.run(tmp_path, f"echo '{says}'; exit {status}").returncode == status
        outcome = tmp_path / "run b/outcome.json"
        found = json.loads(outcome.read_text()) if outcome.exists() else {"state": None}
        assert found["state"] == state

    def test_a_task_without_a_line_is_an_error(self, tmp_path: Path) -> None:
        assert "has no line 3" in self.run(tmp_path, "exit 0", task="2").stderr
        assert "runs in an array" in self.run(tmp_path, "exit 0", task=None).stderr

    def test_shellcheck_is_content(self) -> None:
        if shutil.which("shellcheck") is None:
            pytest.skip("shellcheck is not installed")
        done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout

    def test_it_asks_for_what_the_other_script_does_when_stopped(self) -> None:
        wanted = ["--open-mode=append", "--requeue", "--signal=B:USR1@120"]
        for script in (SCRIPT, ROOT / "launch/slurm.sbatch"):
            options = re.findall(r"^#SBATCH (\S+)", script.read_text(), flags=re.MULTILINE)
            assert set(wanted) <= set(options)
