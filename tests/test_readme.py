"""The README and docs/results.md: the loop and the config run, links lead somewhere, tables match the files."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks

from largebatch.cli import main
from largebatch.distributed.environment import Launch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
_SHORT = f"extends: {ROOT}/largebatch/configs/digits.yaml\nschedule: {{epochs: 2, decay: {{kind: none}}}}\n"


def _block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return found


def _digest(weights: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _run_loop(launch: Launch, folder: str) -> None:
    os.chdir(folder)
    exec(compile(_block("python", "lb.VirtualWorkers"), "README.md", "exec"), {"__name__": "__main__"})


def test_the_loop_of_the_readme_gives_the_weights_of_train(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "digits").write_text(_SHORT)  # a file goes before the shipped config of that name
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--run-dir", "run"]) == 0
    trained = _digest(torch.load("run/model.pt", weights_only=True))
    for world_size in (1, 3):
        run_ranks(_run_loop, world_size, str(tmp_path))
        assert _digest(torch.load("model.pt", weights_only=True)) == trained
        (tmp_path / "model.pt").unlink()


def test_the_loop_of_the_readme_is_short() -> None:
    lines = [line for line in _block("python", "lb.VirtualWorkers").splitlines() if line.strip()]
    assert len(lines) <= 30


def test_the_config_of_the_readme_is_valid(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(_block("yaml", "virtual_workers"))
    assert main(["config", "show", str(path)]) == 0
    assert "virtual_workers: 32" in capsys.readouterr().out


def test_the_plan_of_the_readme_is_what_the_command_prints(capsys: Any) -> None:
    shown = _block("console", "largebatch plan")
    command, *expected = shown.splitlines()
    arguments = command.removeprefix("$ largebatch ").split()
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == expected


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


def test_the_tables_of_the_results_page_are_those_of_the_files() -> None:
    check = [sys.executable, str(ROOT / "benchmarks/readme_figures.py"), "--check"]
    done = subprocess.run(check, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 0, "run python benchmarks/readme_figures.py"
