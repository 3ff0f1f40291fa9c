"""The instant configs: each runs as its header says, and leaves a whole run folder."""

from __future__ import annotations

import json
import math
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from run_folders import ROOT, call, call_on, records, saved_steps, scalars, summary

from largebatch.models.mlp import MLP
from largebatch.models.small_resnet import SmallResNet

CONFIGS = sorted((ROOT / "configs/instant").glob("*.yaml"))
FILES = {
    "config.yaml",
    "plan.json",
    "environment.json",
    "inference.json",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "summary.json",
    "curves.png",
    "samples.png",
    "model.pt",
}
SUMMARY_NAMES = {
    "top1_error",
    "top1_error_median_last5",
    "val_images",
    "steps",
    "seconds",
    "images_per_second",
    "world_size",
    "global_batch",
    "peak_lr",
}
METRIC_NAMES = {
    "step",
    "epoch",
    "train/loss",
    "train/top1_error",
    "lr",
    "images_per_second",
    "data_wait",
    "val/loss",
    "val/top1_error",
    "val/top5_error",
}


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one instant config, named after it."""
    config: Path = request.param
    if config.stem.endswith("_timm"):
        pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("instant") / config.stem
    (outcome,) = call_on(1, "train", config, "--run-dir", folder)
    assert outcome.status == 0, outcome.err
    assert f"plan of {config.stem}" in outcome.out
    assert f"finished: top-1 error {summary(folder)['top1_error']:.2f} %" in outcome.out
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_headers_state_the_command_and_the_time() -> None:
    assert len(CONFIGS) >= 6
    for config in CONFIGS:
        header = "".join(line for line in config.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert f"largebatch train instant/{config.stem}\n" in header, config.name
        assert "Time:" in header, config.name


class TestRunFolder:
    def test_it_holds_what_it_should_and_nothing_else(self, run_dir: Path) -> None:
        assert {path.name for path in run_dir.iterdir()} == FILES

    def test_config(self, run_dir: Path, tmp_path: Path) -> None:
        """The resolved config is the one that was given, whole."""
        given = ROOT / f"configs/instant/{run_dir.name}.yaml"
        assert (run_dir / "config.yaml").read_text() == call("config", "show", given).out
        assert "extends" not in yaml.safe_load((run_dir / "config.yaml").read_text())

    def test_plan(self, run_dir: Path) -> None:
        given = ROOT / f"configs/instant/{run_dir.name}.yaml"
        assert read(run_dir / "plan.json") == json.loads(call("plan", given, "--json").out)

    def test_environment(self, run_dir: Path) -> None:
        environment = read(run_dir / "environment.json")
        assert environment["packages"]["torch"] == metadata.version("torch")
        assert datetime.fromisoformat(environment["started"]).tzinfo is not None
        assert environment["threads"] == 1

    def test_summary(self, run_dir: Path) -> None:
        found, plan, lines = summary(run_dir), read(run_dir / "plan.json"), records(run_dir)
        assert found.keys() >= SUMMARY_NAMES
        assert found["steps"] == plan["total_steps"] == lines[-1]["step"]
        assert 2 <= found["steps"] <= 4
        for name in ("world_size", "global_batch", "peak_lr"):
            assert found[name] == plan[name]
        assert found["val_images"] == plan["val_images"]
        assert found["top1_error"] == found["top1_error_median_last5"] == lines[-1]["val/top1_error"]
        assert found["seconds"] > 0
        assert found["images_per_second"] > 0

    def test_metrics(self, run_dir: Path) -> None:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        plan = read(run_dir / "plan.json")
        classes = yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["synthetic"]["classes"]
        seen = set().union(*lines)
        assert seen >= METRIC_NAMES - ({"val/top5_error"} if classes <= 5 else set())
        assert [line["step"] for line in lines] == list(range(1, plan["total_steps"] + 1))
        for line in lines:
            assert line["epoch"] == line["step"] / plan["steps_per_epoch"]
            digest = line.pop("weights_sha256", None)
            assert (digest is None) == ("val/loss" not in line)
            assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in line.values())
            assert 0 <= line["train/top1_error"] <= 100
            assert 0 <= line["data_wait"] * line["images_per_second"] <= plan["global_batch"]
        assert max(line["lr"] for line in lines) == pytest.approx(plan["peak_lr"])

    def test_tensorboard_has_the_same_figures(self, run_dir: Path) -> None:
        expected: dict[str, list[tuple[int, Any]]] = {}
        for line in records(run_dir):
            for name, value in line.items():
                if name not in ("step", "weights_sha256"):
                    expected.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
        assert scalars(run_dir) == expected

    def test_checkpoints(self, run_dir: Path) -> None:
        total = read(run_dir / "plan.json")["total_steps"]
        assert saved_steps(run_dir) == ([2, 3] if total == 3 else [2])

    def test_curves(self, run_dir: Path) -> None:
        assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")

    def test_weights_load_strictly_into_the_plain_model(self, run_dir: Path) -> None:
        weights = torch.load(run_dir / "model.pt", weights_only=True)
        assert all(type(tensor) is torch.Tensor and tensor.is_contiguous() for tensor in weights.values())
        model = plain_model(run_dir)
        model.load_state_dict(weights, strict=True)
        height = yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["synthetic"]["shape"][1]
        assert model.eval()(torch.zeros(2, 3, height, height)).isfinite().all()

    def test_evaluate_prints_the_runs_figures_on_one_rank_and_on_two(self, run_dir: Path) -> None:
        last = {name: value for name, value in records(run_dir)[-1].items() if name.startswith("val/")}
        for world_size in (1, 2):
            outcomes = call_on(world_size, "evaluate", run_dir)
            assert [outcome.status for outcome in outcomes] == [0] * world_size, outcomes[0].err
            assert json.loads(outcomes[0].out) == {**last, "val/images": summary(run_dir)["val_images"]}
            assert all(outcome.out == "" for outcome in outcomes[1:])


def plain_model(run_dir: Path) -> torch.nn.Module:
    """The model of a run without anything of its training."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    name, made = config["model"]["name"], config["data"]["synthetic"]
    if name == "resnet18":
        return torchvision.models.resnet18(num_classes=made["classes"])
    if name == "mlp":
        return MLP(tuple(made["shape"]), config["model"]["hidden"], made["classes"])
    if name == "timm:test_convnext":
        return pytest.importorskip("timm").create_model("test_convnext", num_classes=made["classes"])
    if name.endswith(":VisionTransformer"):
        arguments = config["model"]["arguments"]
        return torchvision.models.VisionTransformer(**arguments, num_classes=made["classes"])
    assert name == "resnet8"
    return SmallResNet(1, channels=made["shape"][0], classes=made["classes"])
