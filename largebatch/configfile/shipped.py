"""The configs that come with the package, by name: ``digits`` is largebatch/configs/digits.yaml."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"
EXPERIMENTS = FOLDER / "reproduce"
_SUFFIXES = (".yaml", ".yml")


def find_config(name: str | Path, folder: Path | None = None) -> Path:
    """The file that `name` means: one of that path in `folder`, or else the shipped config of that name."""
    path = Path(name) if folder is None else folder / name
    shipped = FOLDER / f"{name}.yaml"
    is_a_name = path.suffix not in _SUFFIXES and not Path(name).is_absolute()
    return shipped if is_a_name and not os.path.isfile(path) and os.path.isfile(shipped) else path


def config_name(path: Path) -> str:
    """How a command names the config file `path`: a shipped one by its name, on any machine the same."""
    resolved, folder = path.resolve(), FOLDER.resolve()
    return resolved.relative_to(folder).with_suffix("").as_posix() if resolved.is_relative_to(folder) else str(path)


def shipped_configs() -> dict[str, str]:
    """What each shipped config is, by name."""
    files = [file for file in sorted(FOLDER.rglob("*.yaml")) if not file.is_relative_to(EXPERIMENTS)]
    return {config_name(file): _summary(file) for file in files}


def shipped_experiments() -> dict[str, str]:
    """What each shipped experiment of `reproduce` is, by name."""
    return {file.stem: _summary(file) for file in sorted(EXPERIMENTS.glob("*.yaml"))}


def _summary(file: Path) -> str:
    """The first sentence of the comment that opens a file."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), file.read_text(encoding="utf-8").splitlines())
    return re.split(r"(?<!et al)\. |\.$", " ".join(line[2:].strip() for line in lines))[0]
