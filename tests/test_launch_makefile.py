from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile without an installation, in a folder of its own."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Not the variables of the make that runs these tests.
    variables = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS", "RANKS")}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60, check=False)


def test_train_installs_then_fetches_then_trains_on_two_ranks(checkout: Path) -> None:
    plan = make(checkout, "--dry-run", "train", "ARGS=schedule.epochs=2").stdout.splitlines()
    assert [line for line in plan if "pip install" in line][-1].endswith("'.[dev]'")
    assert plan[-3] == "touch .venv/.installed"
    assert plan[-2] == ".venv/bin/largebatch data fetch fashion-mnist"
    assert plan[-1] == (
        ".venv/bin/torchrun --standalone --nproc-per-node=2 -m largebatch train fashion_mnist schedule.epochs=2"
    )


def test_an_installation_is_used_until_pyproject_changes(checkout: Path) -> None:
    stamp = checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    assert make(checkout, "--dry-run", "test").stdout.split() == [".venv/bin/pytest", "-n", "2", "--dist", "loadfile"]
    newer = stamp.stat().st_mtime + 10
    os.utime(checkout / "pyproject.toml", (newer, newer))
    assert "pip install" in make(checkout, "--dry-run", "test").stdout


def test_a_python_that_is_too_old_is_refused_in_words(checkout: Path) -> None:
    """An interpreter that believes it is 3.9 stands in for one."""
    old = checkout / "old-python"
    pretence = 'import sys; sys.version_info = (3, 9, 2); sys.version = "3.9.2 (old)"; exec(sys.argv[1])'
    old.write_text(f"#!/usr/bin/env bash\npython3 -c '{pretence}' \"$2\"\n")
    old.chmod(0o755)
    done = make(checkout, "test", "PYTHON=./old-python")
    assert done.returncode != 0
    assert "largebatch needs Python 3.10 or newer, this is 3.9.2" in done.stderr
    assert not (checkout / ".venv").exists()


def test_help_is_the_default_and_lists_the_targets(checkout: Path) -> None:
    done = make(checkout)
    assert [line.split()[1] for line in done.stdout.splitlines()] == [
        "help",
        "train",
        "test",
        "lint",
        "clean",
    ]
