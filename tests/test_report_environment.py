from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy
import pytest
import torch
import torchvision

from largebatch.report import environment
from largebatch.report.environment import describe_environment


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_it_is_json_and_names_what_the_run_ran_on() -> None:
    described = json.loads(json.dumps(describe_environment(), allow_nan=False))
    assert described["python"] == platform.python_version()
    versions = described["packages"]
    assert versions["numpy"] == numpy.__version__
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["torchvision"].split("+")[0] == torchvision.__version__.split("+")[0]
    assert 1 <= described["cpu"]["usable_cores"] <= described["cpu"]["cores"]
    assert described["cpu"]["model"]
    assert described["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert described["cpu"]["bf16"] in (True, False)
    assert described["memory"] > 100e6
    assert described["threads"] == torch.get_num_threads()
    assert described["hostname"] == platform.node()
    assert described["command"][1:] == sys.orig_argv[1:]
    assert (described["cuda"] is None) == (not torch.cuda.is_available())
    started = datetime.fromisoformat(described["started"])
    assert timedelta(0) <= datetime.now(timezone.utc) - started < timedelta(minutes=1)


def test_chosen_variables_are_kept_and_secrets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("NCCL_", "GLOO_", "SLURM_", "OMP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("MY_TOKEN", "secret")
    variables = describe_environment()["variables"]
    assert variables["NCCL_DEBUG"] == "INFO"
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["SLURM_JOB_ID"] == "17"
    assert "MY_TOKEN" not in variables


def test_the_commit_and_whether_tracked_files_differ(tmp_path: Path) -> None:
    source = tmp_path / "package" / "module.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    git(tmp_path, "init")
    assert environment._git(source) is None  # in a repository, but not one of its files
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").touch()
    assert environment._git(source) == {"commit": head, "dirty": False}
    source.write_text("a = 2\n")
    assert environment._git(source) == {"commit": head, "dirty": True}


def test_without_git_or_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment._git(tmp_path / "module.py") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._git(Path(environment.__file__)) is None
