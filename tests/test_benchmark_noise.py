"""What cannot be is marked as noise, and an earlier result is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import call

from largebatch.benchmark.breakdown import noise_in
from largebatch.benchmark.command import write
from largebatch.benchmark.plots import PLOTS
from largebatch.benchmark.tables import noise_notes, scaling_table

COMMITTED = Path(__file__).parents[1] / "results/benchmark/resnet20_cpu/benchmark.json"


def measurement(**changed: Any) -> dict[str, Any]:
    known = {name: {"value": 0.98, "spread": 0.1} for name in ("1 rank without DDP", "1 node of 2 ranks")}
    parts = {"compute": 0.8, "exposed_communication": 0.1, "data_wait": 0.05, "other": 0.05}
    return {
        "world_size": 2, "mode": "weak", "ddp": True, "step": 1.0, "closure": 0.0, "efficiencies": known, **parts,
        **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"data_wait": -0.04}, []),
        ({"data_wait": -0.389}, ["data wait -389.00 ms, below zero"]),
        ({"exposed_communication": -0.06}, ["exposed communication -60.00 ms, below zero"]),
        (
            {"efficiencies": {"1 rank without DDP": {"value": 1.55, "spread": 0.3}}},
            ["efficiency 155 % vs 1 rank without DDP, above 100 %"],
        ),
        # A rank alone may well be faster than each of two, and a node than each of two nodes.
        ({"efficiencies": {"1 node of 2 ranks": {"value": 1.2, "spread": 0.1}}}, []),
        ({"efficiencies": {"1 rank with DDP": {"value": 1.2, "spread": 0.1}}, "world_size": 1}, []),
        ({"closure": 0.3}, ["parts that sum to 130 % of the step"]),
    ],
)
def test_what_cannot_be_is_noise(changed: dict[str, Any], said: list[str]) -> None:
    found = measurement(**changed)
    assert noise_in(found) == said
    assert bool(noise_notes([found])) == bool(said)


def test_noise_is_marked_and_an_earlier_result_is_kept(tmp_path: Path) -> None:
    result = json.loads(COMMITTED.read_text())
    del result["tune"]  # of an earlier version
    said: list[str] = []
    write(result, tmp_path, said.append)
    assert not list(tmp_path.glob("earlier-*"))
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result["measurements"][2]["data_wait"] = -0.389
    result["prediction"] = None
    for number in (1, 2):
        write(result, tmp_path, said.append)
        assert f"the earlier result is kept in {tmp_path}/earlier-{number}" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "earlier-1").iterdir()} == first
    page = (tmp_path / "benchmark.md").read_text()
    assert "| 2 * |" in page
    assert "data wait -389.00 ms, below zero" in page
    assert "no prediction: it would be based on noise" in page
    assert set(PLOTS) - {path.name for path in tmp_path.iterdir()} == {"prediction.png"}
    assert scaling_table(result["measurements"])[1][2][1] == "2 *"


def test_two_benchmarks_side_by_side(tmp_path: Path) -> None:
    result = json.loads(COMMITTED.read_text())
    result["environment"]["packages"]["torch"] = "9.9"
    for m in result["measurements"]:
        m["images_per_second"] *= 2
    result["measurements"][1]["images_per_second"] /= 2
    result["measurements"][2]["data_wait"] = -1.0
    del result["measurements"][3]
    (tmp_path / "benchmark.json").write_text(json.dumps(result))
    done = call("benchmark", "diff", COMMITTED.parent, tmp_path)
    assert done.status == 0, done.err
    rows = [line for line in done.out.splitlines() if line.startswith(("weak", "strong"))]
    assert [row.split("  ")[-1].strip() for row in rows[:4]] == ["faster", "no clear difference", "noise", "only in A"]
    assert "2.000 ± " in rows[0]
    assert "  environment.packages.torch: 2.15.0 | 9.9" in done.out.splitlines()
    (tmp_path / "benchmark.json").write_text("{}")
    failed = call("benchmark", "diff", tmp_path, tmp_path / "none")
    assert (failed.status, failed.err.count("\n")) == (2, 1)
    assert "benchmark.json is not the JSON of a benchmark" in failed.err
    assert call("benchmark", "diff").status == 2
    missing = call("benchmark", "nowhere.yaml")
    assert missing.status == 2
    assert "nowhere.yaml" in missing.err
