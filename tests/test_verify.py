"""`largebatch verify`: the same bits, or the module that breaks them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import DIGITS, SMALL, call, call_on

COUNTED = """
import torch
from torch import nn

class Counting(nn.Module):
    calls = 0

    def forward(self, images):
        self.calls += 1
        return images + 1e-3 * self.calls

def make(classes, shape):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Counting(), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
"""


def test_the_digits_keep_the_promise_on_three_ranks(tmp_path: Path) -> None:
    outcomes = call_on(3, "verify", DIGITS, *SMALL, "--steps", "3", "--run-dir", tmp_path)
    assert [outcome.status for outcome in outcomes] == [0, 0, 0], outcomes
    found = json.loads((tmp_path / "verify.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["1 rank", "2 ranks", "3 ranks", "3 ranks, another deal each step"]
    assert len({tuple(run["sha256"]) for run in found["runs"]}) == 1
    assert len(set(found["runs"][0]["sha256"])) == 3
    assert found["differences"] == {}
    assert outcomes[0].out.count("the same bits after each step") == 3


def test_a_model_that_counts_its_calls_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting_for_test.py").write_text(COUNTED)
    monkeypatch.syspath_prepend(tmp_path)
    own = "model={name: 'counting_for_test:make', arguments: {}}"
    outcomes = call_on(2, "verify", DIGITS, *SMALL, own, "--steps", "2", "--run-dir", tmp_path / "out")
    assert [outcome.status for outcome in outcomes] == [3, 3], outcomes
    assert "the output of module '2' differs for pass" in outcomes[0].err
    assert "keeps Python state" in outcomes[0].err
    assert "2 ranks" in json.loads((tmp_path / "out/verify.json").read_text())["differences"]


def test_what_cannot_be_verified_says_why() -> None:
    outcome = call("verify", DIGITS, "execution.reduction=fast")
    assert outcome.status == 2
    assert "execution.reduction: fast is equal up to rounding only" in outcome.err


def test_what_is_wrong_with_a_config_is_said_by_all_ranks_and_none_waits(tmp_path: Path) -> None:
    for own, said in (
        ("model={name: googlenet, arguments: {aux_logits: true}}", "model.name"),
        ("batch.images_per_worker=4000", "is more than the"),
    ):
        outcomes = call_on(2, "verify", DIGITS, *SMALL, own, "--run-dir", tmp_path)
        assert [outcome.status for outcome in outcomes] == [2, 2], outcomes
        assert said in outcomes[0].err


def test_a_static_graph_is_no_hindrance(tmp_path: Path) -> None:
    options = ["batch={virtual_workers: 2, images_per_worker: 4}", "execution.static_graph=true", "--steps", "1"]
    outcomes = call_on(2, "verify", DIGITS, *SMALL, *options, "--run-dir", tmp_path)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
