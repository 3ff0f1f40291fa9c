"""Contract 10: resume is invisible. Whatever stopped a run and whatever goes on with it, nobody can tell."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RanksFailed, run_ranks
from run_folders import (
    DIGITS,
    SMALL,
    call,
    records,
    saved_steps,
    scalars,
    summary,
    tensor_hashes,
    train_digits,
    train_digits_until_killed,
)

from largebatch.cli import main
from largebatch.distributed.environment import Launch
from largebatch.training.checkpoint import FORMAT, CheckpointFolder

EVERY_STEP = "checkpoint.every_steps=1"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped, on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_digits(folder, 1)
    return folder


def final_state(run_dir: Path) -> dict[str, Any]:
    """What the last checkpoint holds, less the clock's part and the number of ranks."""
    state = torch.load(run_dir / f"checkpoints/step_{saved_steps(run_dir)[-1]:08d}.pt", weights_only=True)
    return {key: value for key, value in state.items() if key not in ("seconds", "train_seconds", "world_size")}


def assert_equal(one: Any, other: Any) -> None:
    """Equal to the last bit, however deep."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_invisible(undisturbed: Path, run_dir: Path) -> None:
    """`run_dir` is what it would be had nothing happened: weights, momentum, figures, each step once."""
    assert tensor_hashes(run_dir) == tensor_hashes(undisturbed)
    assert_equal(final_state(run_dir), final_state(undisturbed))
    assert records(run_dir) == records(undisturbed)
    assert scalars(run_dir) == scalars(undisturbed)
    assert summary(run_dir)["top1_error_median_last5"] == summary(undisturbed)["top1_error_median_last5"]


def test_killed_in_mid_epoch_on_4_and_gone_on_with_on_3(undisturbed: Path, tmp_path: Path) -> None:
    train_digits_until_killed(tmp_path, 4, 3)
    assert saved_steps(tmp_path)[-1] < 8, "killed within the first epoch"
    outcomes = train_digits(tmp_path, 3)
    assert "resuming from step" in outcomes[0].out
    assert_invisible(undisturbed, tmp_path)
    assert summary(tmp_path)["world_size"] == 3


def test_killed_twice_within_one_epoch_and_gone_on_with_alone(undisturbed: Path, tmp_path: Path) -> None:
    train_digits_until_killed(tmp_path, 2, 9, EVERY_STEP)
    first = saved_steps(tmp_path)[-1]
    train_digits_until_killed(tmp_path, 3, first + 2, EVERY_STEP)
    second = saved_steps(tmp_path)[-1]
    assert 8 < first < second < 16, "both within the second epoch"
    train_digits(tmp_path, 1, EVERY_STEP)
    assert_invisible(undisturbed, tmp_path)


def _die_after_saving(_: Launch, arguments: list[str], step: int) -> None:
    save = CheckpointFolder.save

    def save_and_die(self: CheckpointFolder, saved_step: int, data: bytes) -> Path:
        path = save(self, saved_step, data)
        if saved_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    CheckpointFolder.save = save_and_die  # type: ignore[method-assign]
    main(arguments)


@pytest.mark.parametrize("step", [1, 8, 16], ids=["first", "end_of_epoch", "last"])
def test_stopped_right_after_a_checkpoint(undisturbed: Path, tmp_path: Path, step: int) -> None:
    command = ["train", DIGITS, "--run-dir", str(tmp_path), *SMALL, EVERY_STEP]
    with pytest.raises(RanksFailed, match="the process died"):
        run_ranks(_die_after_saving, 1, command, step)
    assert saved_steps(tmp_path)[-1] == step
    assert not (tmp_path / "model.pt").exists()
    assert f"resuming from step {step} of 16" in train_digits(tmp_path, 1, EVERY_STEP)[0].out
    assert_invisible(undisturbed, tmp_path)


def _fail_at_step(_: Launch, arguments: list[str], step: int) -> int:
    from largebatch.training.trainer import Trainer

    train_step = Trainer._train_step

    def fail(self: Trainer, *inputs: Any) -> Any:
        if self.step == step:
            next(self.virtual.model.parameters()).data.fill_(float("nan"))
        return train_step(self, *inputs)

    Trainer._train_step = fail  # type: ignore[method-assign]
    return main(arguments)


def test_stopped_by_health_exits_3_and_can_be_gone_on_with(undisturbed: Path, tmp_path: Path) -> None:
    command = ["train", DIGITS, "--run-dir", str(tmp_path), *SMALL]
    assert run_ranks(_fail_at_step, 2, command, 10) == [3, 3]
    assert saved_steps(tmp_path)[-1] == 9
    train_digits(tmp_path, 2)
    assert_invisible(undisturbed, tmp_path)


class TestFinishedRun:
    """A copy of the undisturbed run, called once more."""

    @pytest.fixture
    def run_dir(self, undisturbed: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(undisturbed, tmp_path / "run"))

    def test_nothing_is_done_and_the_figures_stay(self, run_dir: Path) -> None:
        before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        printed = summary(run_dir)
        outcomes = train_digits(run_dir, 2)
        assert f"top-1 error {printed['top1_error']:.2f} %" in outcomes[0].out
        assert "nothing to do" in outcomes[0].out
        assert outcomes[1].out == ""
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before

    def test_what_is_missing_is_made_again_from_the_last_checkpoint(self, undisturbed: Path, run_dir: Path) -> None:
        (run_dir / "model.pt").unlink()
        (run_dir / "summary.json").write_text("{")
        train_digits(run_dir, 1)
        assert_invisible(undisturbed, run_dir)

    def test_resume_never_starts_anew_and_removes_only_its_own(self, undisturbed: Path, run_dir: Path) -> None:
        others = ["notes.txt", "checkpoints/notes.txt", "model.pt.old", "plots/model.pt"]
        for name in others:
            (run_dir / name).parent.mkdir(exist_ok=True)
            (run_dir / name).write_text("mine")
        (run_dir / "checkpoints/step_00000099.pt").write_text("of a longer run")
        outcomes = train_digits(run_dir, 1, "--resume", "never")
        assert "resuming" not in outcomes[0].out
        assert "warning: checkpoint" not in outcomes[0].out
        assert [(run_dir / name).read_text() for name in others] == ["mine"] * len(others)
        assert saved_steps(run_dir) == saved_steps(undisturbed)
        assert not (run_dir / "checkpoints/step_00000099.pt").exists()
        assert_invisible(undisturbed, run_dir)

    def test_resume_never_starts_anew_where_checkpoints_is_a_link(self, run_dir: Path, tmp_path: Path) -> None:
        (run_dir / "checkpoints").rename(tmp_path / "scratch")
        (run_dir / "checkpoints").symlink_to(tmp_path / "scratch")
        outcomes = train_digits(run_dir, 1, "--resume", "never", "schedule.reference_lr=0.05")
        assert "resuming" not in outcomes[0].out

    def test_a_changed_config_is_refused_by_every_key_that_differs(self, run_dir: Path) -> None:
        changes = ["schedule.reference_lr=0.2", "optimizer.nesterov=false", "seed=1", "execution.precision=bf16"]
        before = tensor_hashes(run_dir)
        outcome = call("train", DIGITS, "--run-dir", run_dir, *SMALL, *changes)
        assert outcome.status == 2
        for line in (
            "schedule.reference_lr: was 0.1, now 0.2",
            "optimizer.nesterov: was True, now False",
            "seed: was 0, now 1",
            "execution.precision: was 'fp32', now 'bf16'",
        ):
            assert line in outcome.err
        assert outcome.err.count(": was ") == len(changes)
        assert "--resume never" in outcome.err
        assert tensor_hashes(run_dir) == before

    def test_checkpoints_without_their_config_are_refused(self, run_dir: Path) -> None:
        (run_dir / "config.yaml").unlink()
        outcome = call("train", DIGITS, "--run-dir", run_dir, *SMALL)
        assert outcome.status == 2
        assert "no config.yaml" in outcome.err

    def test_a_damaged_config_in_the_folder_is_named(self, run_dir: Path) -> None:
        (run_dir / "config.yaml").write_text("batch: [1")
        outcome = call("train", DIGITS, "--run-dir", run_dir, *SMALL)
        assert outcome.status == 2
        assert str(run_dir / "config.yaml") in outcome.err


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run as it stood after step 9."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(RanksFailed):
        run_ranks(_die_after_saving, 1, ["train", DIGITS, "--run-dir", str(folder), *SMALL], 9)
    return folder


class TestStoppedRun:
    """A copy of the stopped run, gone on with."""

    @pytest.fixture
    def run_dir(self, stopped: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(stopped, tmp_path / "run"))

    def test_logging_checkpoints_and_the_like_may_change(self, undisturbed: Path, run_dir: Path) -> None:
        free = ["checkpoint={every_steps: 5, keep: 1}", "execution.bucket_mb=0.05", "data.loader_processes=0"]
        train_digits(run_dir, 2, *free, "logging.every_steps=1")
        assert saved_steps(run_dir) == [16]
        assert tensor_hashes(run_dir) == tensor_hashes(undisturbed)
        assert [line["step"] for line in records(run_dir)] == [3, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16]

    def test_another_order_of_images_is_refused(self, run_dir: Path) -> None:
        self._change_newest(run_dir, order_fingerprint="0" * 64)
        outcome = call("train", DIGITS, "--run-dir", run_dir, *SMALL)
        assert outcome.status == 2
        assert "in another order" in outcome.err

    def test_another_number_of_images_is_refused(self, run_dir: Path) -> None:
        self._change_newest(run_dir, images_consumed=9 * 32 + 1)
        outcome = call("train", DIGITS, "--run-dir", run_dir, *SMALL)
        assert outcome.status == 2
        assert "consumed 289 images in 9 steps" in outcome.err

    def test_another_model_is_refused(self, run_dir: Path) -> None:
        self._change_newest(run_dir, model={"weight": torch.zeros(3)})
        outcome = call("train", DIGITS, "--run-dir", run_dir, *SMALL)
        assert outcome.status == 2
        assert "does not fit this run's model" in outcome.err

    def test_another_versions_checkpoint_is_refused(self, run_dir: Path) -> None:
        self._change_newest(run_dir, format=99)
        outcome = call("train", DIGITS, "--run-dir", run_dir, *SMALL)
        assert outcome.status == 2
        assert f"not of format {FORMAT}" in outcome.err

    def test_a_damaged_metrics_file_is_named_by_line(self, run_dir: Path) -> None:
        path = run_dir / "metrics.jsonl"
        path.write_text("garbage\n" + path.read_text())
        outcome = call("train", DIGITS, "--run-dir", run_dir, *SMALL)
        assert outcome.status == 2
        assert f"{path}:1" in outcome.err

    @staticmethod
    def _change_newest(run_dir: Path, **changes: Any) -> None:
        """A whole checkpoint, checksum and all, with other contents."""
        path = run_dir / "checkpoints/step_00000009.pt"
        state = torch.load(path, weights_only=True)
        torch.save({**state, **changes}, path)
        data = path.read_bytes()
        path.unlink()
        CheckpointFolder(path.parent, keep=2).save(9, data)
        assert json.loads(path.with_suffix(".json").read_text())["size"] == len(data)
