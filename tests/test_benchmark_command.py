"""`largebatch benchmark`, from the command line to its files, with real ranks; never a word about speed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from PIL import Image
from ranks import run_ranks

from largebatch.benchmark import command
from largebatch.benchmark.command import benchmark
from largebatch.benchmark.harness import Harness
from largebatch.benchmark.options import Options
from largebatch.benchmark.tune import Candidate, _combine, candidates, check_tune, tune_notes
from largebatch.config import Config
from largebatch.data.load import load
from largebatch.distributed.environment import Launch, connect
from largebatch.errors import UserError

TINY = {
    "model": {"name": "resnet8"},
    "data": {
        "name": "synthetic",
        "synthetic": {"shape": [3, 8, 8], "classes": 4, "train_images": 64, "val_images": 8},
        "augmentation": {"kind": "crop", "padding": 1},
    },
    "batch": {"virtual_workers": 3, "images_per_worker": 4},
    "execution": {"device": "cpu"},
}
PARTS = ("compute", "exposed_communication", "data_wait", "other")


def _benchmark(launch: Launch, options: Options, folder: str) -> None:
    # So short windows are noise on most machines, from which nothing would be predicted.
    with mock.patch("largebatch.benchmark.results.noise_in", return_value=[]):
        benchmark(Config.model_validate(TINY), options, launch, Path(folder), command="benchmark tiny.yaml")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three ranks, of which one and two run while the rest sleep."""
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    options = Options(
        ranks=(1, 2, 3),
        mode="both",
        rounds=2,
        window_seconds=0.01,
        largest_allreduce=1 << 16,
        tune=True,
        predict=(3, 8),
        network=1.25e9,
    )
    run_ranks(_benchmark, 3, options, str(folder), timeout=170)
    return folder, json.loads((folder / "benchmark.json").read_text())


def test_the_files_are_all_there(result: tuple[Path, dict[str, Any]]) -> None:
    names = {path.name for path in result[0].iterdir()}
    pictures = {"throughput.png", "step_time.png", "breakdown.png", "prediction.png"}
    assert names == {"benchmark.json", "benchmark.csv", "benchmark.md", "tune.yaml"} | pictures
    assert all((result[0] / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_measurements_have_the_names_that_others_rely_on(result: tuple[Path, dict[str, Any]]) -> None:
    found = result[1]["measurements"]
    assert [(m["mode"], m["world_size"], m["ddp"], m["global_batch"]) for m in found] == [
        ("weak", 1, False, 4),
        ("weak", 1, True, 4),
        ("weak", 2, True, 8),
        ("weak", 3, True, 12),
        ("strong", 1, False, 12),
        ("strong", 1, True, 12),
        ("strong", 2, True, 12),
        ("strong", 3, True, 12),
    ]
    for m in found:
        assert all(isinstance(m[name], float) for name in ("step", *PARTS, "images_per_second", "efficiency"))
        assert m["baseline"] == "1 rank without DDP"
        assert set(m["efficiencies"]) == {"1 rank without DDP", "1 rank with DDP", "1 node of 3 ranks"}
        assert 0 <= m["slowest_rank"] < m["world_size"]
        assert len(m["peak_memory_by_rank"]) == m["world_size"]
    assert "packages" in result[1]["environment"]


def test_the_derived_figures_follow_from_the_raw_windows(result: tuple[Path, dict[str, Any]]) -> None:
    for m in result[1]["measurements"]:
        whole = [max(w["seconds_by_rank"]) for w in m["windows"] if w["kind"] == "whole"]
        assert len(whole) >= 2
        assert m["step"] == pytest.approx(torch.tensor(sorted(whole), dtype=torch.float64).quantile(0.5).item())
        assert m["images_per_second"] == pytest.approx(m["global_batch"] / m["step"])
        assert m["closure"] == pytest.approx(sum(m[part] for part in PARTS) / m["step"] - 1)
        assert all(len(w["seconds_by_rank"]) == m["world_size"] for w in m["windows"])
        kinds = {w["kind"] for w in m["windows"]}
        assert kinds == {"compute", "update", "whole"} | ({"exchange"} if m["ddp"] else set())


def test_every_gradient_is_in_a_bucket_that_gets_ready_within_the_step(result: tuple[Path, dict[str, Any]]) -> None:
    from largebatch.models.build import build

    config = Config.model_validate(TINY)
    model = build(config.model, classes=4, shape=(3, 8, 8), seed=0)
    gradients = sum(4 * p.numel() for p in model.parameters())
    certificate = sum(2 * 4 for _ in model.parameters())
    for m in result[1]["measurements"]:
        if m["ddp"]:
            sums, *buckets = m["buckets"]  # the losses and statistics go first
            assert sums["size"] < gradients
            assert sum(bucket["size"] for bucket in buckets) == gradients + certificate
            times = [0.0, sums["ready"], *(bucket["ready"] for bucket in buckets), m["replay_seconds"]]
            assert times == sorted(times)


def test_the_all_reduce_is_measured_by_both_reductions(result: tuple[Path, dict[str, Any]]) -> None:
    found = result[1]["allreduce"]
    assert {(a["world_size"], a["reduction"]) for a in found} == {
        (n, reduction) for n in (2, 3) for reduction in ("fast", "reproducible")
    }
    for a in found:
        assert a["algbw"] == pytest.approx(a["size"] / a["seconds"])
        assert a["busbw"] == pytest.approx(a["algbw"] * 2 * (a["world_size"] - 1) / a["world_size"])


def test_predictions_come_with_the_error_of_their_fit(result: tuple[Path, dict[str, Any]]) -> None:
    prediction = result[1]["prediction"]
    assert prediction["algorithm"] == "ring"
    assert set(prediction["leave_one_out"]) == {"N=2", "N=3"}
    assert {(p["world_size"], p["nodes"]) for p in prediction["predictions"]} == {(3, 1), (8, 3)}
    text = (result[0] / "benchmark.md").read_text()
    assert "leave-one-out error" in text
    assert all(f"assumed: {assumption}" in text for assumption in prediction["assumptions"])
    assert len(prediction["assumptions"]) >= 3


def test_the_csv_has_a_line_for_each_measurement(result: tuple[Path, dict[str, Any]]) -> None:
    with (result[0] / "benchmark.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["step"]) for line in lines] == [m["step"] for m in result[1]["measurements"]]


def test_tuned_settings_are_yaml_that_a_config_takes(result: tuple[Path, dict[str, Any]]) -> None:
    text = (result[0] / "tune.yaml").read_text()
    settings = yaml.safe_load(text) or {}
    changed = {section: {**TINY[section], **keys} for section, keys in settings.items()}
    Config.model_validate({**TINY, **changed})
    assert {t["name"] for t in result[1]["tune"]["tried"]} >= {
        "bucket_mb=1.0",
        "static_graph=True",
        "gradient_as_bucket_view=True",
        "reduction=fast, compression=bf16",
        "virtual_workers=6",
    }
    assert "twice the ±" in text
    assert "twice the ±" in (result[0] / "benchmark.md").read_text()


def test_what_changes_numbers_says_so() -> None:
    for candidate in candidates(Config.model_validate(TINY), 3):
        keys = {key for found in candidate.settings.values() for key in found}
        assert bool(candidate.numerics) == bool(keys & {"reduction", "compression", "virtual_workers"})
    static = [c for c in candidates(Config.model_validate(TINY), 2) if "static_graph" in c.name]
    assert not static, "two ranks have two passes of three between them"


def _trial(settings: dict[str, dict[str, Any]], gain: float, numerics: str = "") -> dict[str, Any]:
    return {"settings": settings, "gain": gain, "spread": 0.01, "numerics": numerics, "faster": gain > 0.01}


def test_together_the_faster_of_two_values_wins() -> None:
    found = _combine(
        [
            _trial({"execution": {"bucket_mb": 5.0}}, 0.10),
            _trial({"execution": {"bucket_mb": 1.0}}, 0.05),
            _trial({"execution": {"static_graph": True}}, 0.02),
        ]
    )
    assert found == Candidate({"execution": {"bucket_mb": 5.0, "static_graph": True}})


def test_without_a_faster_setting_the_config_is_kept() -> None:
    lines = tune_notes(
        {"world_size": 2, "tried": [_trial({"batch": {"virtual_workers": 8}}, 0.001, "x")], "best": None}
    )
    assert len(lines) == 2
    assert "of 1 settings some are ahead by chance" in lines[0]
    assert "keep the config" in lines[1]


def test_what_changes_numbers_is_named_only_if_it_was_clearly_faster() -> None:
    tried = [_trial({"execution": {"reduction": "fast"}}, gain, "rounded") for gain in (0.3, 0.005)]
    text = "\n".join(tune_notes({"world_size": 2, "tried": tried, "best": None}))
    assert "+30.0" in text
    assert "+0.5" not in text


def test_a_precision_that_the_cpu_emulates_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def slow(precision: str, device: torch.device) -> str:
        asked.append(f"{precision} on {device.type}")
        return "slow here"

    monkeypatch.setattr(command, "slow_precision", slow)
    monkeypatch.setattr(command, "_measure_all", lambda *_: print("measuring"))
    monkeypatch.setattr(command, "write", lambda *_: None)
    config = Config.model_validate({**TINY, "execution": {"device": "cpu", "precision": "bf16"}})
    benchmark(config, Options(ranks=(1,)), Launch(), tmp_path, command="benchmark tiny.yaml")
    assert asked == ["bf16 on cpu"]
    assert capsys.readouterr().out.splitlines() == ["warning: slow here", "measuring"]


def test_there_is_nothing_to_tune_with_one_rank() -> None:
    with pytest.raises(UserError, match="--tune: with one rank nothing is exchanged"):
        check_tune(Options(ranks=(1,), tune=True))


def _command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "largebatch", "benchmark", "tiny.yaml", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_without_a_launcher_the_line_to_type_is_printed(tmp_path: Path) -> None:
    done = _command(tmp_path, "batch.virtual_workers=4", "--ranks", "1,2")
    assert done.returncode == 2
    line = (
        "torchrun --standalone --nproc-per-node=2 -m largebatch benchmark tiny.yaml batch.virtual_workers=4 --ranks 1,2"
    )
    assert line in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "medium"), "--mode: 'medium' is not one of weak, strong, both"),
        (("--ranks", "two"), "--ranks: 'two' is not a list"),
        (("--network", "quick"), "--network: 'quick' is not a rate"),
        (("--run-dir", "tiny.yaml"), "--run-dir: tiny.yaml cannot be made (File exists)"),
        (("--predict", "8"), "--predict: nothing was measured on several ranks"),
    ],
)
def test_wrong_options_are_told_in_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = _command(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_real_pictures_come_through_the_loader(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                picture = Image.effect_noise((12, 10), 50 + number).convert("RGB")
                picture.save(tmp_path / part / name / f"{number}.png")
    data = {"name": "imagefolder", "root": str(tmp_path), "image_size": 8, "resize_size": 8, "loader_processes": 1}
    config = Config.model_validate({**TINY, "data": data, "batch": {"virtual_workers": 1, "images_per_worker": 4}})
    with connect(Launch(), device="cpu") as ranks:
        harness = Harness(config, ranks, load(config.data, seed=0, device=ranks.device))
        for kind in ("whole", "compute", "whole"):
            ends = harness.window(kind, 3)
            assert len(ends) == 3
            assert ends == sorted(ends)


def test_one_rank_needs_no_launcher(tmp_path: Path) -> None:
    done = _command(tmp_path, "--rounds", "2", "--window-seconds", "0.01")
    assert done.returncode == 0, done.stderr
    assert "1 (DDP)" in done.stdout
    found = json.loads((tmp_path / "runs/benchmark_tiny/benchmark.json").read_text())
    assert [m["ddp"] for m in found["measurements"]] == [False, True]
    assert found["allreduce"] == []
