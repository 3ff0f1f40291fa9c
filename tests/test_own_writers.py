"""`logging.writers`: records reach writers of the user's own, whose failures cost no training; and `samples.png`."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import DIGITS, ROOT, SMALL, call, records, saved_steps

from largebatch.config import read_config
from largebatch.data.load import load
from largebatch.data.mixing import Mixing
from largebatch.plan import make_order

SHORT = [*SMALL, "schedule.epochs=1", "schedule.decay.kind=none", "model.name=mlp"]
WRITERS = """
class Kept:
    def __init__(self, run_dir, config):
        self.file = (run_dir / "kept.txt").open("a")
        self.write({"step": config["seed"]})

    def write(self, record):
        self.file.write(f"{record}\\n")

    def close(self):
        self.file.close()


class Breaks(Kept):
    def write(self, record):
        if record["step"] > 3:
            raise ConnectionError("the service is down")
        super().write(record)


def fails(run_dir, config):
    raise SystemExit("no key")


def half(run_dir, config):
    return print
"""


@pytest.fixture
def writers(tmp_path: Path, monkeypatch: Any) -> str:
    """The name of a module of writers."""
    name = f"writers_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(WRITERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def train(run_dir: Path, *writers: str) -> Any:
    return call("train", DIGITS, "--run-dir", run_dir, *SHORT, f"logging.writers={json.dumps(writers)}")


def kept(run_dir: Path) -> list[dict[str, Any]]:
    return [eval(line, {"nan": math.nan}) for line in (run_dir / "kept.txt").read_text().splitlines()]


def test_a_writer_gets_every_record_and_one_that_breaks_is_left_out(tmp_path: Path, writers: str) -> None:
    run = tmp_path / "run"
    outcome = train(run, f"{writers}:Kept")
    assert outcome.status == 0, outcome.err
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kept(run) == [{"step": 0}, *({k: v for k, v in line.items() if k != "time"} for line in written)]
    other = tmp_path / "other"
    outcome = train(other, f"{writers}:Breaks")
    assert outcome.status == 0, outcome.err
    assert [line["step"] for line in kept(other)] == [0, 3]
    assert records(other) == records(run)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("WRITERS:fails", "WRITERS:fails' failed when called with (run_dir, config): SystemExit: no key"),
        ("WRITERS:half", "returned a builtin_function_or_method without write(record) and close()"),
        ("WRITERS:Kepd", "has no 'Kepd'; did you mean 'Kept'?"),
        ("nowhere_at_all:Kept", "'nowhere_at_all:Kept' cannot be imported: ModuleNotFoundError"),
        ("wandb", "'wandb' is not of the form package.module:function"),
    ],
)
def test_a_writer_that_cannot_be_made_ends_the_run_before_it_starts(
    tmp_path: Path, writers: str, name: str, said: str
) -> None:
    outcome = train(tmp_path / "run", name.replace("WRITERS", writers))
    assert outcome.status == 2
    assert said.replace("WRITERS", writers) in outcome.err
    assert "logging.writers" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not saved_steps(tmp_path / "run")


def documented(name: str, tmp_path: Path, monkeypatch: Any) -> str:
    """The import path of a writer that docs/using.md shows."""
    page = (ROOT / "docs/using.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if f"class {name}" in block]
    assert len([line for line in code.splitlines() if line]) <= 14
    (tmp_path / "my_writers.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_writers", raising=False)
    return f"my_writers:{name}"


def test_the_documented_writer_for_weights_and_biases_works_offline(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    outcome = train(tmp_path / "run", documented("WeightsAndBiases", tmp_path, monkeypatch))
    assert outcome.status == 0, outcome.err
    assert "logging.writers" not in outcome.err
    (path,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    content = path.read_bytes()
    for line in records(tmp_path / "run"):
        assert json.dumps(line["train/loss"]).encode() in content
        assert line.get("weights_sha256", "").encode() in content


def test_the_documented_writer_for_mlflow_works_offline(tmp_path: Path, monkeypatch: Any) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    outcome = train(tmp_path / "run", documented("MLflow", tmp_path, monkeypatch))
    assert outcome.status == 0, outcome.err
    assert "logging.writers" not in outcome.err
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("largebatch").experiment_id])
    for name in ("train/loss", "val/top1_error"):
        expected = [(line["step"], line[name]) for line in records(tmp_path / "run") if name in line]
        assert [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)] == expected


def test_samples_show_what_the_model_gets(tmp_path: Path) -> None:
    mixing = ["data.augmentation={mixup_alpha: 0.4, padding: 1}", "logging.sample_images=3"]
    run = tmp_path / "run"
    assert call("train", DIGITS, "--run-dir", run, *SHORT, *mixing).status == 0
    config = read_config(run / "config.yaml")
    source, _ = load(config.data, seed=0, device=torch.device("cpu"))
    images, labels = source.batch(0, make_order(config, source.images).indices(0, range(1)))
    images, _ = Mixing(config.data.augmentation, classes=10, seed=0)(images, labels, 0, range(1))
    pixels = (255 * (images[:3, 0] * source.std[0] + source.mean[0]).clamp(0, 1)).numpy()
    with Image.open(run / "samples.png") as shown:
        grid = np.asarray(shown)
    assert grid.shape == (64 + 4, 3 * (64 + 2) + 2, 3)
    for number, image in enumerate(pixels):
        cell = grid[2 : 2 + 64, 2 + 66 * number : 2 + 66 * number + 64, 0].astype(float)
        assert np.abs(cell - image.repeat(8, 0).repeat(8, 1)).max() <= 1
    assert shown_in_tensorboard(run) == [grid.shape[:2]]
    (run / "summary.json").unlink()
    assert call("train", DIGITS, "--run-dir", run, *SHORT, *mixing).status == 0
    assert shown_in_tensorboard(run) == [grid.shape[:2]], "a run that is resumed shows them again, once"
    without = call("train", DIGITS, "--run-dir", run, "--resume", "never", *SHORT, "logging.sample_images=0")
    assert without.status == 0, without.err
    assert not (run / "samples.png").exists()


def shown_in_tensorboard(run_dir: Path) -> list[tuple[int, int]]:
    """Height and width of the images there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return [(image.height, image.width) for image in events.Images("train/first_images")]
