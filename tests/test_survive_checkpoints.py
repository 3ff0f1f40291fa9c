"""Checkpoints: written while training goes on, by the clock too; on disks that are full, read-only or rotten."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_folders import records, saved_steps, tensor_hashes
from survive import Fleet, newest_step, run_to_the_end, slow_steps, training

from largebatch.recipe.draws import bits
from largebatch.report.metrics import _RunWriter
from largebatch.training import saver
from largebatch.training.checkpoint import CheckpointFolder, TrainState
from largebatch.training.saver import BackgroundSaver
from largebatch.training.trainer import Trainer

ALL = "checkpoint={every_steps: 1, keep: 100}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps the checkpoint of every step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_to_the_end(1, folder, ALL)
    assert saved_steps(folder) == list(range(1, 17))
    return folder


def state_of(run_dir: Path, step: int) -> dict[str, Any]:
    """All that a checkpoint holds but the clock's part and the number of ranks."""
    state = torch.load(run_dir / f"checkpoints/step_{step:08d}.pt", weights_only=True)
    return {key: value for key, value in state.items() if key not in ("seconds", "train_seconds", "world_size")}


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def _write_slowly(_: int) -> None:
    """A checkpoint is on the disk two steps later, or when the trainer waits for it, since the next one is due."""
    save, wait, train_step = CheckpointFolder.save, BackgroundSaver.wait, Trainer._train_step
    now = {"step": 0, "awaited": 0}

    def slowly(self: CheckpointFolder, step: int, data: bytes) -> Path:
        deadline = time.monotonic() + 30
        while now["step"] < step + 2 and not now["awaited"] and time.monotonic() < deadline:
            time.sleep(0.002)
        return save(self, step, data)

    def wait_for_it(self: BackgroundSaver) -> None:
        now["awaited"] = 1
        wait(self)
        now["awaited"] = 0

    def pause(self: Trainer, *inputs: Any) -> Any:
        time.sleep(0.03)
        facts = train_step(self, *inputs)
        if self._saver._thread is not None and self._saver._thread.is_alive():
            print("a step while a checkpoint is written", flush=True)
        now["step"] = self.step
        return facts

    CheckpointFolder.save = slowly  # type: ignore[method-assign]
    BackgroundSaver.wait = wait_for_it  # type: ignore[method-assign]
    Trainer._train_step = pause  # type: ignore[method-assign]


def test_what_is_written_is_the_state_of_its_step_though_training_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    by_clock = "checkpoint={every_epochs: null, every_steps: null, every_minutes: 0.001, keep: 3}"
    with Fleet(2, *training(tmp_path, by_clock), prepare=_write_slowly) as fleet:
        outcomes = fleet.outcomes()
    assert [outcome.status for outcome in outcomes] == [0, 0]
    assert outcomes[0].out.count("a step while a checkpoint is written") > 3
    steps = saved_steps(tmp_path)
    assert len(steps) == 3, "as many as are kept"
    assert steps[-1] == 16
    for step in steps:
        assert_equal(state_of(tmp_path, step), state_of(undisturbed, step))


# ---- disks


def _fail_at(rank: int, *steps: int) -> None:
    """A disk that is full while the checkpoints of `steps` are written."""
    save = CheckpointFolder.save

    def full(self: CheckpointFolder, step: int, data: bytes) -> Path:
        assert rank == 0, "nobody else writes"
        if step in steps:
            raise OSError(28, "No space left on device", str(self._path(step)))
        return save(self, step, data)

    CheckpointFolder.save = full  # type: ignore[method-assign]


def test_a_checkpoint_that_cannot_be_written_stops_all_ranks(undisturbed: Path, tmp_path: Path) -> None:
    with Fleet(3, *training(tmp_path), prepare=_fail_at, prepare_args=(8, 9)) as fleet:
        for outcome in fleet.outcomes():
            assert outcome.status == 2
            assert "could not be written" in outcome.err
            assert "No space left on device" in outcome.err
            assert "step_00000008" in outcome.err
            assert "Traceback" not in outcome.err
    assert saved_steps(tmp_path) == [3, 6]
    assert "resuming from step 6 of 16" in run_to_the_end(1, tmp_path)[0].out
    assert tensor_hashes(tmp_path) == tensor_hashes(undisturbed)


def test_or_it_is_told_and_training_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    command = training(tmp_path, "checkpoint.on_error=continue")
    with Fleet(2, *command, prepare=_fail_at, prepare_args=(8, 12)) as fleet:
        outcomes = fleet.outcomes()
    assert [outcome.status for outcome in outcomes] == [0, 0]
    assert outcomes[0].out.count("warning: a checkpoint could not be written") == 2
    assert saved_steps(tmp_path) == [15, 16]
    assert tensor_hashes(tmp_path) == tensor_hashes(undisturbed)


def _fail_from(rank: int, step: int) -> None:
    """No checkpoint can be written from `step` on, and steps are long enough to be hit."""
    _fail_at(rank, *range(step, 17))
    slow_steps(rank)


def test_a_stop_whose_checkpoint_is_not_there_never_says_that_it_is(tmp_path: Path) -> None:
    command = training(tmp_path, "checkpoint.on_error=continue")
    with Fleet(2, *command, prepare=_fail_from, prepare_args=(4,)) as fleet:
        fleet.until(lambda: newest_step(tmp_path) == 3)
        fleet.send(signal.SIGTERM)
        for outcome in fleet.outcomes():
            assert outcome.status == 2  # not 75: the same command would lose what was done since
            assert "whose checkpoint could not be written. The newest checkpoint is of step 3." in outcome.err
    assert saved_steps(tmp_path) == [3]


def _fail_to_record(_: int) -> None:
    write = _RunWriter.write

    def full(self: _RunWriter, record: dict[str, float]) -> None:
        if record["step"] == 9:
            raise OSError(28, "No space left on device")
        write(self, record)

    _RunWriter.write = full  # type: ignore[method-assign]


def test_a_record_that_cannot_be_written_stops_all_ranks(undisturbed: Path, tmp_path: Path) -> None:
    with Fleet(2, *training(tmp_path), prepare=_fail_to_record) as fleet:
        for outcome in fleet.outcomes():
            assert outcome.status == 2
            assert "a record of the metrics could not be written" in outcome.err
            assert "Traceback" not in outcome.err
    run_to_the_end(1, tmp_path)
    assert tensor_hashes(tmp_path) == tensor_hashes(undisturbed)
    assert records(tmp_path)[-1]["step"] == 16


def _run_out_of_memory(rank: int, step: int) -> None:
    save = BackgroundSaver.save

    def without_memory(state: TrainState) -> bytes:
        raise MemoryError("cannot allocate")

    def spoil(self: BackgroundSaver, state: TrainState) -> None:
        if state.step == step:
            saver.serialise = without_memory
        save(self, state)

    BackgroundSaver.save = spoil  # type: ignore[method-assign]


def test_whatever_keeps_a_checkpoint_from_being_written_stops_all_ranks(tmp_path: Path) -> None:
    with Fleet(2, *training(tmp_path), prepare=_run_out_of_memory, prepare_args=(6,)) as fleet:
        for outcome in fleet.outcomes():
            assert outcome.status == 2
            assert "a checkpoint could not be written (cannot allocate)" in outcome.err
            assert "Traceback" not in outcome.err
    assert saved_steps(tmp_path) == [3]


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system of its own at `folder`; skips where nobody may mount one."""
    folder.mkdir()
    command = ["mount", *options, str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"cannot mount here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True, timeout=10)


def fill(folder: Path) -> Path:
    """Leave not a byte."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        size = 1 << 16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    return filler


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_is_really_full(undisturbed: Path, tmp_path: Path, on_error: str) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        run_dir = disk / "run"
        command = training(run_dir, f"checkpoint.on_error={on_error}")
        with Fleet(2, *command, prepare=slow_steps) as fleet:
            fleet.until(lambda: newest_step(run_dir) >= 3)
            filler = fill(disk)
            outcomes = fleet.outcomes()
            # With "continue" the run goes on to its end, where there is no room for the weights either.
            assert [outcome.status for outcome in outcomes] == [2, 2], fleet.story()
        assert all("Traceback" not in outcome.err for outcome in outcomes), outcomes[0].err
        assert all("No space left on device" in outcome.err for outcome in outcomes)
        assert ("warning: a checkpoint could not be written" in outcomes[0].out) == (on_error == "continue")
        kept = newest_step(run_dir)
        assert 3 <= kept < 16
        filler.unlink()
        out = run_to_the_end(1, run_dir)[0].out
        assert f"resuming from step {kept} of 16" in out
        assert "damaged" not in out
        assert tensor_hashes(run_dir) == tensor_hashes(undisturbed)
        steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))


def test_a_folder_that_has_become_read_only(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Fleet(1, *training(run_dir), prepare=slow_steps) as fleet:
        fleet.until(lambda: newest_step(run_dir) >= 6)
        fleet.send(15)
        assert fleet.outcomes()[0].status == 75
    reached = newest_step(run_dir)
    (run_dir / "checkpoints").rename(run_dir / "before")
    with mounted(run_dir / "checkpoints", "--bind", "-o", "ro", str(run_dir / "before")):
        with Fleet(2, *training(run_dir)) as fleet:
            for outcome in fleet.outcomes():
                assert outcome.status == 2
                assert "Read-only file system" in outcome.err
        with Fleet(2, *training(run_dir, "checkpoint.on_error=continue")) as fleet:
            outcomes = fleet.outcomes()
            assert [outcome.status for outcome in outcomes] == [0, 0], fleet.story()
        assert "warning: a checkpoint could not be written" in outcomes[0].out
        assert newest_step(run_dir) == reached
    assert tensor_hashes(run_dir) == tensor_hashes(undisturbed)


# ---- damage


def _truncate(path: Path, draw: int) -> None:
    os.truncate(path, int(bits(np.arange(1), 21, draw)[0] % np.uint64(path.stat().st_size)))


def _flip_byte(path: Path, draw: int) -> None:
    place, value = (int(x) for x in bits(np.arange(2), 22, draw))
    with path.open("r+b") as file:
        file.seek(place % path.stat().st_size)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ (1 + value % 255)]))


@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("damage", [_truncate, _flip_byte])
def test_0_of_100_damaged_checkpoints_are_loaded_silently(
    undisturbed: Path, tmp_path: Path, damage: Callable[[Path, int], None], suffix: str
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (15, 16):
        for kind in (".pt", ".json"):
            shutil.copy(undisturbed / f"checkpoints/step_000000{step}{kind}", folder)
    path = folder / f"step_00000016{suffix}"
    whole, before = path.read_bytes(), (folder / "step_00000015.pt").read_bytes()
    newest = (folder / "step_00000016.pt").read_bytes()
    silent = []
    for draw in range(100):
        path.write_bytes(whole)
        damage(path, draw)
        warnings: list[str] = []
        found = CheckpointFolder(folder, keep=2).newest(warnings.append)
        if suffix == ".json" and found == newest and not warnings:
            # Space between two values, say: what the manifest says is what it said.
            assert json.loads(path.read_bytes()) == json.loads(whole)
            continue
        if found != before or len(warnings) != 1 or "step_00000016" not in warnings[0]:
            silent.append(draw)
    assert silent == []
