"""300 configs with one thing broken: each ends with status 2 and one line that names the key; nothing is started."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from run_folders import ROOT, call

from largebatch.config import read_config
from largebatch.configfile.loading import dump_config

FILES = ("digits", "fashion_mnist", "imagenet_resnet50_8k", "imagenet_resnet50_8k_constant_warmup")
# Whatever they hold is handed to the user's own code.
FREE = {"model.arguments", "data.arguments", "data.root"}


def resolved(name: str) -> dict[str, Any]:
    """A config of ours with every default filled in: each key that there is can be broken."""
    return yaml.safe_load(dump_config(read_config(ROOT / f"configs/{name}.yaml")))


def leaves(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{above}{key}"
        if path in FREE:
            continue
        if isinstance(value, dict):
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


CONFIGS = {name: resolved(name) for name in FILES}
LEAVES = sorted({(name, path) for name, values in CONFIGS.items() for path, _ in leaves(values)})
SECTIONS = sorted({(name, path.rpartition(".")[0]) for name, path in LEAVES})


def wrong_values(value: Any) -> list[Any]:
    """What no key that holds `value` can take."""
    nonsense = [{"a": 1}, [[1]], "½", float("nan"), float("-inf"), [None]]
    if isinstance(value, bool):
        return [*nonsense, 2, "yes", None, 0.5]
    if isinstance(value, (int, float)):
        return [*nonsense, True, "1", -(10**30), [3]]
    if isinstance(value, str):
        return [*nonsense[:2], 3, True, [value]]
    return nonsense[:1]


def replace(values: dict[str, Any], path: str, value: Any, *, key: str | None = None) -> dict[str, Any]:
    """A copy with `value` at `path`; with `key`, beside it under that name."""
    broken = copy.deepcopy(values)
    *sections, last = path.split(".") if path else [""]
    inner = broken
    for section in sections:
        inner = inner[section]
    inner[key or last] = value
    return broken


@st.composite
def breakages(draw: st.DrawFn) -> tuple[str, str, Any, str]:
    """A config's name, where it is broken, the whole file's values, and the path that must be named."""
    kind = draw(st.sampled_from(["value", "value", "value", "unknown", "section"]))
    if kind == "section":
        name, section = draw(st.sampled_from(SECTIONS))
        if not section:
            return name, "seed", replace(CONFIGS[name], "seed", "½"), "seed"
        return name, section, replace(CONFIGS[name], section, draw(st.sampled_from([3, "x", [1], True]))), section
    name, path = draw(st.sampled_from(LEAVES))
    if kind == "unknown":
        key = path.rpartition(".")[2] + draw(st.sampled_from(["s", "_", "2"]))
        where = ".".join([*path.split(".")[:-1], key])
        return name, where, replace(CONFIGS[name], path, 1, key=key), where
    value = dict(leaves(CONFIGS[name]))[path]
    return name, path, replace(CONFIGS[name], path, draw(st.sampled_from(wrong_values(value)))), path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken")


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(broken=breakages(), by_override=st.booleans())
@example(broken=("digits", "seed", replace(CONFIGS["digits"], "seed", -1), "seed"), by_override=False)
def test_one_broken_thing_is_named_and_nothing_started(
    folder: Path, broken: tuple[str, str, Any, str], by_override: bool
) -> None:
    name, where, values, path = broken
    file, run_dir = folder / "broken.yaml", folder / "run"
    overrides = []
    if by_override:
        inner = values
        for key in where.split("."):
            inner = inner[key]
        file.write_text(yaml.safe_dump(CONFIGS[name]))
        overrides = [f"{where}={yaml.safe_dump(inner, default_flow_style=True, allow_unicode=True).split(chr(10))[0]}"]
    else:
        file.write_text(yaml.safe_dump(values, allow_unicode=True))
    outcome = call("train", file, "--run-dir", run_dir, *overrides)
    assert outcome.status == 2, outcome
    # The reader itself refuses numbers that are none, by line and column.
    assert path in outcome.err or "is not a finite number" in outcome.err, outcome.err
    assert "Traceback" not in outcome.err
    assert not os.path.exists(run_dir)


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["batch.virtual_workers=1000000"], "batch"),
        (["execution.workers_per_pass=3"], "workers_per_pass"),
        (["execution.compression=fp16", "execution.reduction=reproducible"], "execution"),
        (["schedule.decay.epochs=[16, 12]"], "schedule"),
        (["schedule.warmup.epochs=1e6"], "warmup"),
    ],
)
def test_values_that_do_not_fit_together_are_named(tmp_path: Path, overrides: list[str], path: str) -> None:
    outcome = call("train", ROOT / "configs/digits.yaml", "--run-dir", tmp_path / "run", *overrides)
    assert outcome.status == 2
    assert path in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists()
