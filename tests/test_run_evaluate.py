"""`largebatch evaluate`: the run's own figures, or a clear refusal; nothing in a model.pt is ever executed.

That it prints the run's figures on one rank and on two is tested with every instant config.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import DIGITS, SMALL, call, call_on, records, summary

SHORT = [*SMALL, "schedule.epochs=1", "schedule.decay.kind=none", "model.name=mlp"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (outcome,) = call_on(1, "train", DIGITS, "--run-dir", folder, *SHORT)
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_more_ranks_than_batches_print_the_same(run_dir: Path) -> None:
    """101 images in batches of 60 on three ranks: one of them has nothing to do."""
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("images_per_batch: 25", "images_per_batch: 60"))
    alone, (several, *rest) = call_on(1, "evaluate", run_dir)[0], call_on(3, "evaluate", run_dir)
    assert (alone.status, several.status) == (0, 0), several.err
    assert several.out == alone.out
    assert [outcome.out for outcome in rest] == ["", ""]
    result = json.loads(alone.out)
    assert result["val/images"] == 101
    assert result["val/top1_error"] == summary(run_dir)["top1_error"]
    assert result["val/loss"] == pytest.approx(records(run_dir)[-1]["val/loss"], rel=1e-6)


def test_it_changes_nothing_in_the_run_folder(run_dir: Path) -> None:
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert call("evaluate", run_dir).status == 0
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


class _Bomb:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self._trace,)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _transpose(path: Path) -> None:
    torch.save({name: tensor.t() for name, tensor in torch.load(path, weights_only=True).items()}, path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "model.pt: damaged"),
    "garbage": (lambda path: path.write_bytes(b"\x80\x02garbage" * 99), "model.pt: damaged"),
    "truncated": (_truncate, "model.pt: damaged"),
    "bomb": (lambda path: torch.save({"a": _Bomb(path.parent / "trace")}, path), "more than tensors"),
    "bare_bomb": (lambda path: path.write_bytes(pickle.dumps(_Bomb(path.parent / "trace"), 2)), "more than tensors"),
    "a_list": (lambda path: torch.save([1, 2], path), "not the weights of this run's model"),
    "a_number": (lambda path: torch.save(3, path), "not the weights of this run's model"),
    "other_names": (lambda path: torch.save({"w": torch.zeros(2)}, path), "not the weights of this run's model"),
    "other_shapes": (_transpose, "not the weights of this run's model"),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_model_is_refused(run_dir: Path, damage: Callable[[Path], object], problem: str) -> None:
    damage(run_dir / "model.pt")
    outcome = call("evaluate", run_dir)
    assert outcome.status == 2, outcome.err
    assert problem in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert not (run_dir / "trace").exists()


@pytest.mark.parametrize("text", [None, "", "batch: [1", "batch: {virtual_wrokers: 8}"])
def test_a_damaged_config_is_refused(run_dir: Path, text: str | None) -> None:
    config = run_dir / "config.yaml"
    config.unlink() if text is None else config.write_text(text)
    outcome = call("evaluate", run_dir)
    assert outcome.status == 2, outcome.err
    assert str(config) in outcome.err
    assert "Traceback" not in outcome.err


def test_a_run_that_has_not_begun_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    outcome = call("evaluate", tmp_path)
    assert outcome.status == 2
    assert "no model.pt here, and no checkpoint" in outcome.err


def test_an_unfinished_run_is_evaluated_by_its_newest_checkpoint(run_dir: Path) -> None:
    (run_dir / "model.pt").unlink()
    outcome = call("evaluate", run_dir, "evaluation.images_per_batch=7")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["val/top1_error"] == summary(run_dir)["top1_error"]


def test_a_run_that_was_killed_before_its_summary_has_the_same_one(run_dir: Path) -> None:
    before = summary(run_dir)
    for name in ("summary.json", "model.pt"):
        (run_dir / name).unlink()
    (outcome,) = call_on(1, "train", DIGITS, "--run-dir", run_dir, *SHORT)
    assert outcome.status == 0, outcome.err
    assert summary(run_dir)["weights_sha256"] == before["weights_sha256"] == records(run_dir)[-1]["weights_sha256"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("schedule.epochs=3", "evaluate accepts overrides of data, execution and evaluation"),
        ("data.val_images=50", "data.root: the validation set had 101 images, now 50"),
        ("data.name=mnist", "MNIST"),
    ],
)
def test_what_is_not_the_run_s_own_is_refused(run_dir: Path, override: str, said: str) -> None:
    outcome = call("evaluate", run_dir, override)
    assert outcome.status == 2
    assert said.lower() in outcome.err.lower()
    assert "Traceback" not in outcome.err


def test_other_data_are_refused_on_resume_and_in_evaluation(folder: Path) -> None:
    run = folder / "run"
    command = ("train", folder / "config.yaml", "--run-dir", run, "schedule.epochs=2", "checkpoint.every_steps=1")
    assert call(*command).status == 0
    for name in ("summary.json", "model.pt"):
        (run / name).unlink()
    (folder / "set/val/cat").rename(folder / "set/val/cow")
    (folder / "set/train/cat").rename(folder / "set/train/cow")
    renamed = "different classes: number 0 was 'cat', now 'cow'"
    for said, again in ((renamed, command), (renamed, ("evaluate", run))):
        outcome = call(*again)
        assert outcome.status == 2, outcome.err
        assert said in outcome.err
    assert call("evaluate", run, "data.on_change=accept").status == 0
    (folder / "set/val/cow").rename(folder / "set/val/cat")
    (folder / "set/train/cow").rename(folder / "set/train/cat")
    image = folder / "set/train/cat/0.jpg"
    image.write_bytes(image.read_bytes() + b" ")
    outcome = call(*command)
    assert "files of the training set have different names or sizes: cat/0.jpg has changed. " in outcome.err
    assert "data.on_change=accept" in outcome.err
    (folder / "set/val/dog/0.jpg").rename(folder / "set/val/dog/5.jpg")
    (folder / "set/train/dog/7.jpg").rename(folder / "set/dog7")
    outcome = call(*command)
    assert "the training set had 16 images, now 15 (cat/0.jpg has changed, dog/7.jpg is gone)" in outcome.err
    assert "the validation set have different names or sizes: dog/0.jpg is gone, dog/5.jpg is new. " in outcome.err
    (folder / "set/dog7").rename(folder / "set/train/dog/7.jpg")
    assert call(*command, "data.on_change=accept").status == 0


def test_what_a_run_folder_says_is_enough_to_use_the_weights_in_plain_torch(folder: Path) -> None:
    """The lines that docs/runs.md shows."""
    command = ["train", folder / "config.yaml", "--run-dir", folder / "run", "model.name=resnet18"]
    assert call(*command).status == 0
    page = (Path(__file__).parents[1] / "docs/runs.md").read_text()
    code = "#" + page.split("```python\n# predict:")[1].split("```")[0]
    scope: dict[str, Any] = {"run": str(folder / "run"), "image_file": str(folder / "set/val/dog/1.jpg")}
    exec(code, scope)
    assert scope["name"] in ("cat", "dog")


def test_the_users_own_files_in_a_run_folder_stay(folder: Path) -> None:
    run = folder / "run"
    (run / "real").mkdir(parents=True)
    (run / "tensorboard").symlink_to(run / "real")
    (run / "real/notes.txt").write_text("mine")
    text = "# my own comment\n" + (folder / "config.yaml").read_text()
    (run / "config.yaml").write_text(text)
    assert call("train", run / "config.yaml", "--run-dir", run).status == 0
    assert call("train", run / "config.yaml", "--run-dir", run, "--resume", "never").status == 0
    assert (run / "config.yaml").read_text() == text
    assert (run / "real/notes.txt").read_text() == "mine"
    outcome = call("train", run / "config.yaml", "seed=3", "--run-dir", run, "--resume", "never")
    assert outcome.status == 2
    assert "is the config that is given, and would be overwritten" in outcome.err
    assert (run / "config.yaml").read_text() == text


def test_a_run_folder_that_is_not_utf_8_is_refused(folder: Path) -> None:
    outcome = call("train", folder / "config.yaml", "--run-dir", os.fsdecode(bytes(folder) + b"/r\xff"))
    assert outcome.status == 2, outcome.err
    assert "r\\udcff: is not UTF-8" in outcome.err


def test_class_names_that_are_not_utf_8_are_kept(folder: Path) -> None:
    name = os.fsdecode(b"c\xfft")
    for part in ("train", "val"):
        (folder / "set" / part / "cat").rename(folder / "set" / part / name)
    assert call("train", folder / "config.yaml", "--run-dir", folder / "run").status == 0
    assert json.loads((folder / "run/inference.json").read_text())["class_names"] == [name, "dog"]
    assert call("evaluate", folder / "run").status == 0
