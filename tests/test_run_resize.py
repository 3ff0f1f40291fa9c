"""`batch.on_resize: rescale`: a run that goes on with other ranks keeps its virtual workers per rank."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from run_folders import (
    DIGITS,
    SMALL,
    call,
    call_on,
    records,
    saved_steps,
    scalars,
    summary,
    tensor_hashes,
    train_digits,
)

RESCALE = ["batch.on_resize=rescale", "schedule.resize_ramp_epochs=0.25", "logging.every_steps=1"]


def stopped_after(run_dir: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as a kill would have left it when the checkpoint of `step` was the newest."""
    shutil.copytree(run_dir, copy)
    for name in ("summary.json", "model.pt", "curves.png"):
        (copy / name).unlink()
    for later in [saved for saved in saved_steps(copy) if saved > step]:
        for file in (copy / "checkpoints").glob(f"step_{later:08d}.*"):
            file.unlink()
    assert saved_steps(copy)[-1] == step
    return copy


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """k = 8 on 2 ranks, kn = 32, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("on_two") / "run"
    train_digits(folder, 2, *RESCALE, "checkpoint.keep=99")
    return folder


@pytest.fixture(scope="module")
def rescaled(on_two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but gone on with on 4 ranks after step 3: 16 workers, kn = 64."""
    folder = stopped_after(on_two, 3, tmp_path_factory.mktemp("rescaled") / "run")
    outcomes = train_digits(folder, 4, *RESCALE, "checkpoint.keep=99")
    assert "resized at step 3: 4 ranks instead of 2" in outcomes[0].out
    assert "minibatch of 64 images" in outcomes[0].out
    return folder


def test_the_minibatch_and_the_rate_follow_the_ranks(rescaled: Path) -> None:
    # 270 images: 96 are gone after 3 steps of 32, so two steps of 64 are left of the first epoch; then 4 more.
    found = {line["step"]: line for line in records(rescaled)}
    assert list(found) == list(range(1, 10))
    assert [found[step]["global_batch"] for step in found] == [32] * 3 + [64] * 6
    assert [found[step]["epoch"] for step in (3, 5, 9)] == [0.375, 1.0, 2.0]
    # η = 0.1 at 16: the peak is 0.4, reached in one step from the 0.15 that the warmup had come to, and decays at 1.5.
    assert [found[step]["lr"] for step in range(4, 10)] == pytest.approx([0.4] * 4 + [0.04] * 2)
    assert {step for step, line in found.items() if "val/loss" in line} == {5, 9}
    assert [value for _, value in scalars(rescaled)["global_batch"]] == [32] * 3 + [64] * 6
    assert summary(rescaled)["global_batch"] == 64
    assert summary(rescaled)["steps"] == 9


def test_only_the_ratio_of_ranks_counts(on_two: Path, rescaled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    train_digits(folder, 1, *RESCALE, "checkpoint.keep=99")
    assert tensor_hashes(folder) == tensor_hashes(on_two)
    again = stopped_after(folder, 3, tmp_path / "run")
    train_digits(again, 2, *RESCALE)
    assert tensor_hashes(again) == tensor_hashes(rescaled)
    assert records(again) == records(rescaled)


def test_stopped_again_after_a_resize(rescaled: Path, tmp_path: Path) -> None:
    same = stopped_after(rescaled, 6, tmp_path / "same")
    train_digits(same, 4, *RESCALE)
    assert tensor_hashes(same) == tensor_hashes(rescaled)
    # Whoever no longer wants it keeps what there is, on any ranks.
    kept = stopped_after(rescaled, 6, tmp_path / "kept")
    train_digits(kept, 3, *RESCALE, "batch.on_resize=keep")
    assert tensor_hashes(kept) == tensor_hashes(rescaled)
    assert records(kept) == records(rescaled)


def test_back_to_the_first_number_of_ranks(rescaled: Path, tmp_path: Path) -> None:
    back = stopped_after(rescaled, 6, tmp_path / "back")
    train_digits(back, 2, *RESCALE)
    found = {line["step"]: line for line in records(back)}
    # One step of 64 was done in the second epoch: 206 images are left, six steps of 32.
    assert [found[step]["global_batch"] for step in found] == [32] * 3 + [64] * 3 + [32] * 6
    assert found[12]["epoch"] == 2.0
    assert found[7]["lr"] == pytest.approx(0.2)


def test_a_minibatch_too_small_for_what_the_run_measures_is_refused(tmp_path: Path) -> None:
    probing = [*RESCALE, "logging.noise_scale_every_steps=1"]
    few = ["batch.virtual_workers=2", "batch.images_per_worker=16"]
    train_digits(tmp_path / "two", 2, *few, *probing, "checkpoint.keep=99")
    folder = stopped_after(tmp_path / "two", 3, tmp_path / "stopped")
    outcome = call("train", DIGITS, "--run-dir", folder, *SMALL, *few, *probing)
    assert outcome.status == 2
    assert "with batch.virtual_workers 1: logging.noise_scale_every_steps" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(("world_size", "after"), [(3, None), (3, 3)], ids=["at_the_start", "going_on"])
def test_workers_that_do_not_come_out_even_are_refused(
    on_two: Path, tmp_path: Path, world_size: int, after: int | None
) -> None:
    folder = tmp_path / "run"
    if after is not None:
        train_digits(folder, world_size, "checkpoint.keep=99")
        folder = stopped_after(folder, 3, tmp_path / "stopped")
        world_size = 2
    outcomes = call_on(world_size, "train", DIGITS, "--run-dir", folder, *SMALL, *RESCALE)
    assert [outcome.status for outcome in outcomes] == [2] * world_size
    assert "8 on 3 ranks were uneven" in outcomes[0].err
    assert not any("Traceback" in outcome.err for outcome in outcomes)


def test_k_that_follows_the_ranks(tmp_path: Path) -> None:
    small = [option for option in SMALL if not option.startswith("batch=")]
    follow = ["batch={virtual_workers: null, workers_per_rank: 2, images_per_worker: 4}", "checkpoint.keep=99"]

    def train(run: Path, ranks: int, *options: str) -> str:
        outcomes = call_on(ranks, "train", DIGITS, "--run-dir", run, *small, *options)
        assert [outcome.status for outcome in outcomes] == [0] * ranks, outcomes
        return outcomes[0].out

    train(tmp_path / "follows", 2, *follow)
    train(tmp_path / "fixed", 1, "batch={virtual_workers: 4, images_per_worker: 4}")
    assert tensor_hashes(tmp_path / "follows") == tensor_hashes(tmp_path / "fixed")
    assert summary(tmp_path / "follows")["peak_lr"] == summary(tmp_path / "fixed")["peak_lr"] == pytest.approx(0.1)
    # On another number of ranks it stays what it was, or follows, as `on_resize` says.
    kept = stopped_after(tmp_path / "follows", 6, tmp_path / "kept")
    assert "k stays 4, as before the stop, though batch.workers_per_rank would make it 6 on 3 ranks" in train(
        kept, 3, *follow
    )
    assert tensor_hashes(kept) == tensor_hashes(tmp_path / "fixed")
    followed = stopped_after(tmp_path / "follows", 6, tmp_path / "followed")
    assert "minibatch of 24 images" in train(followed, 3, *follow, "batch.on_resize=rescale")
    planned = call("plan", DIGITS, *small, *follow, "--ranks", "6")
    assert "48 = 12 virtual workers (2 for each of the ranks) x 4 images" in planned.out
    both = call("plan", DIGITS, "batch.workers_per_rank=1")
    assert both.status == 2
    assert "virtual_workers 8 and workers_per_rank 1 are both set" in both.err
