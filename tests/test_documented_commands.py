"""The commands that the Makefile, launchers, documents and config headers show can be typed as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from largebatch.cli import main
from largebatch.config import Config, read_config

ROOT = Path(__file__).parents[1]
PLACES = [
    ROOT / "Makefile",
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "launch").iterdir()),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "largebatch/configs").rglob("*.yaml")),
]
# A config as it is typed, and what follows it on the line.
_COMMAND = re.compile(
    r"(?:largebatch|\.sh|\.sbatch) (?:train|benchmark|plan|doctor|verify|config show)"
    r"\s+((?!diff )[a-z0-9_/]+)(?=[\s`])([^`|#(\n\"']*)"
)
_MAKE = re.compile(r'ARGS="((?!-)[^"]+)"')


def documented() -> list[tuple[str, ...]]:
    """The config and overrides of each command shown, without options."""
    found = set()
    for place in PLACES:
        text = place.read_text(encoding="utf-8").replace("\\\n", " ")
        for config, rest in _COMMAND.findall(text):
            found.add((config, *(word for word in rest.split() if re.match(r"[a-z_.]+=", word))))
        if place.name in ("Makefile", "CONTRIBUTING.md"):
            found.update(("fashion_mnist", *overrides.split()) for overrides in _MAKE.findall(text))
    return sorted(found)


def test_the_short_runs_are_among_them() -> None:
    short = {command for command in documented() if any(word.startswith("schedule.epochs=") for word in command)}
    assert {("fashion_mnist", f"schedule.epochs={epochs}") for epochs in (1, 2)} <= short


def test_keys_and_configs_that_the_documents_show_exist(tmp_path: Path) -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)[`:=]", text):
            section: Any = Config
            for key in path.split(".") if path.split(".")[0] in Config.model_fields and path != "model.pt" else []:
                assert key in getattr(section, "model_fields", {}), f"{page.name}: {path}"
                section = section.model_fields[key].annotation
        for i, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)):
            shown = yaml.safe_load(block)
            if isinstance(shown, dict) and shown.keys() <= Config.model_fields.keys():
                (tmp_path / f"{page.stem}_{i}.yaml").write_text(block)
                read_config(tmp_path / f"{page.stem}_{i}.yaml")


@pytest.mark.parametrize("command", documented(), ids=" ".join)
def test_a_documented_command_is_accepted(command: tuple[str, ...], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["config", "show", *command]) == 0, capsys.readouterr().err


def test_the_short_run_of_make_help_trains(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    small = ["data.name=synthetic", "data.synthetic.train_images=1024", "data.synthetic.val_images=8"]
    small += ["model.width=4", "execution.workers_per_pass=16"]
    command = ["train", "fashion_mnist", "--run-dir", str(tmp_path / "run"), "schedule.epochs=2", *small]
    assert main(command) == 0
    assert "schedule.warmup.epochs=" in capsys.readouterr().err, "what was scaled is in the log"
