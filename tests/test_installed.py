"""The wheel in an empty folder, without the checkout: shipped configs and experiments are found by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from run_folders import SMALL

ROOT = Path(__file__).parents[1]
_PRINT_WHERE = "import largebatch; print(largebatch.__file__)"
_BUILD = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"


class Installed:
    """The unpacked wheel, used from an empty folder."""

    def __init__(self, folder: Path) -> None:
        source, self.package, self.folder = folder / "source", folder / "package", folder / "empty"
        self.folder.mkdir()
        shutil.copytree(ROOT / "largebatch", source / "largebatch", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        self._python("-c", _BUILD, str(folder), cwd=source)
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(self.package)

    def _python(self, *arguments: str, cwd: Path) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(self.package)},
            capture_output=True,
            text=True,
            timeout=170,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def python(self, *arguments: str) -> str:
        """What the interpreter prints."""
        return self._python(*arguments, cwd=self.folder)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    pytest.importorskip("setuptools", minversion="77")
    return Installed(tmp_path_factory.mktemp("installed"))


def test_every_config_is_in_the_wheel_and_listed(installed: Installed) -> None:
    assert Path(installed.python("-c", _PRINT_WHERE).strip()).is_relative_to(installed.package)
    listed = [line.split()[0] for line in installed.python("-m", "largebatch", "config", "list").splitlines()]
    files = (ROOT / "largebatch/configs").rglob("*.yaml")
    names = {file.relative_to(ROOT / "largebatch/configs").with_suffix("").as_posix() for file in files}
    experiments = {name.removeprefix("reproduce/") for name in names if not name.startswith("reproduce/base/")}
    assert set(listed) - {"Configs", "Experiments"} == experiments
    for name in sorted(names - {f"reproduce/{name}" for name in experiments}):
        assert (installed.package / f"largebatch/configs/{name}.yaml").is_file()


def test_train_by_name_and_extend_by_name(installed: Installed) -> None:
    assert "finished" in installed.python("-m", "largebatch", "train", "digits", *SMALL)
    assert (installed.folder / "runs/digits/model.pt").is_file()
    (installed.folder / "mine.yaml").write_text("extends: benchmark/resnet50_gpu\nbatch: {virtual_workers: 5}\n")
    assert "kn        160 = 5 " in installed.python("-m", "largebatch", "plan", "mine.yaml")


_SHORT = """
extends: reproduce/warmup
rows: [{name: reference}, {name: none, config: {schedule: {warmup: {kind: none}}}}]
scales: {smoke: {base: reproduce/base/smoke, config: {schedule: {epochs: 1, decay: {kind: none}}}, seeds: 1}}
"""


def test_reproduce_by_name(installed: Installed) -> None:
    assert "gradual " in installed.python("-m", "largebatch", "reproduce", "status", "warmup", "--scale", "smoke")
    (installed.folder / "short.yaml").write_text(_SHORT)
    said = installed.python("-m", "largebatch", "reproduce", "run", "short.yaml", "--jobs", "1")
    assert "2 of 2 runs are done" in said
    installed.python("-m", "largebatch", "reproduce", "report", "short.yaml")
    report = (installed.folder / "results/reproduce/smoke/short.md").read_text()
    assert "`largebatch train reproduce/base/smoke " in report, "a name, and no path of this machine"
