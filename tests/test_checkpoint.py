"""Contract 9: a checkpoint is whole or does not count, and nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RanksFailed, run_ranks
from run_folders import DIGITS, SMALL, call, records, saved_steps, tensor_hashes, train_digits

from largebatch.distributed.environment import Launch
from largebatch.errors import DataError
from largebatch.recipe.draws import bits
from largebatch.training.checkpoint import CheckpointFolder, TrainState, deserialise, serialise

Damage = Callable[[Path], object]
CPU = torch.device("cpu")


def content(step: int) -> bytes:
    return f"checkpoint of step {step} ".encode() * 50


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 10, 20 and 30."""
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", keep=3)
    for step in (10, 20, 30):
        checkpoints.save(step, content(step))
    return tmp_path / "checkpoints"


def newest(folder: Path) -> tuple[bytes | None, list[str]]:
    warnings: list[str] = []
    return CheckpointFolder(folder, keep=3).newest(warnings.append), warnings


def truncate(length: int) -> Damage:
    return lambda path: os.truncate(path.with_suffix(".pt"), length)


def flip(draw: int) -> Damage:
    """Flip one bit at a place and of a value that only chance decides."""

    def damage(path: Path) -> None:
        data = bytearray(path.with_suffix(".pt").read_bytes())
        place = int(bits(np.arange(1), draw)[0]) % (8 * len(data))
        data[place // 8] ^= 1 << place % 8
        path.with_suffix(".pt").write_bytes(data)

    return damage


def manifest(**changes: Any) -> Damage:
    def damage(path: Path) -> None:
        path.with_suffix(".json").write_text(json.dumps(json.loads(path.with_suffix(".json").read_text()) | changes))

    return damage


def manifest_text(text: bytes) -> Damage:
    return lambda path: path.with_suffix(".json").write_bytes(text)


DAMAGES = {
    **{f"truncated_to_{length}": truncate(length) for length in (0, 1, 17, 500, 1099)},
    **{f"flipped_bit_{draw}": flip(draw) for draw in range(5)},
    "appended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "data_missing": lambda path: path.unlink(),
    "data_a_folder": lambda path: (path.unlink(), path.mkdir()),
    "manifest_missing": lambda path: path.with_suffix(".json").unlink(),
    "manifest_empty": manifest_text(b""),
    "manifest_garbage": manifest_text(b"\xff\xfe\0garbage"),
    "manifest_a_list": manifest_text(b"[1, 2]"),
    "manifest_a_number": manifest_text(b"3"),
    "manifest_of_another_kind": manifest_text(b'{"a": 1}'),
    "manifest_of_the_one_before": lambda path: shutil.copy(
        path.with_name("step_00000020.json"), path.with_suffix(".json")
    ),
    "manifest_of_another_step": manifest(step=40),
    "manifest_size_a_string": manifest(size="1100"),
    "manifest_checksum_null": manifest(sha256=None),
    "both_of_the_one_before": lambda path: [
        shutil.copy(path.with_name("step_00000020").with_suffix(s), path.with_suffix(s)) for s in (".pt", ".json")
    ],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_falls_back_loudly_to_the_one_before(folder: Path, damage: Damage) -> None:
    damage(folder / "step_00000030.pt")
    data, warnings = newest(folder)
    assert data == content(20)
    (warning,) = warnings
    assert "step_00000030" in warning
    assert "damaged" in warning
    assert "\n" not in warning


def test_whole_checkpoints_give_the_newest_without_a_word(folder: Path) -> None:
    assert newest(folder) == (content(30), [])


def test_several_damaged_ones_are_each_told(folder: Path) -> None:
    flip(1)(folder / "step_00000030.pt")
    truncate(5)(folder / "step_00000020.pt")
    data, warnings = newest(folder)
    assert data == content(10)
    assert [warning.split("step_000000")[1][:2] for warning in warnings] == ["30", "20"]


def test_none_left_is_told_too(folder: Path) -> None:
    for step in (10, 20, 30):
        truncate(5)(folder / f"step_000000{step}.pt")
    data, warnings = newest(folder)
    assert data is None
    assert len(warnings) == 4
    assert "starts over from step 0" in warnings[-1]


def test_no_checkpoints_are_nothing_to_warn_of(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])


def test_the_manifest_says_what_was_written(folder: Path) -> None:
    expected = {"step": 30, "size": 1100, "sha256": hashlib.sha256(content(30)).hexdigest()}
    assert json.loads((folder / "step_00000030.json").read_text()) == expected


def test_other_files_in_the_folder_do_not_count(folder: Path) -> None:
    for name in ("step_.json", "step_x.json", "step_00000099 (copy).json", "step_40.pt", "notes.json", "step_00000050"):
        (folder / name).write_text("{}")
    assert newest(folder) == (content(30), [])
    CheckpointFolder(folder, keep=1).save(40, content(40))
    assert len(list(folder.iterdir())) == 6 + 2


class TestKeeping:
    def test_the_newest_k_are_kept(self, tmp_path: Path) -> None:
        for keep in (1, 2, 3):
            checkpoints = CheckpointFolder(tmp_path / str(keep), keep=keep)
            for step in range(5, 60, 5):
                checkpoints.save(step, content(step))
            kept = {f"step_{step:08d}.{kind}" for step in range(60 - 5 * keep, 60, 5) for kind in ("pt", "json")}
            assert {path.name for path in (tmp_path / str(keep)).iterdir()} == kept

    def test_a_damaged_later_one_never_pushes_out_the_one_just_saved(self, folder: Path) -> None:
        """The run went on from step 20, because 30 was damaged, and saves at 25."""
        truncate(5)(folder / "step_00000030.pt")
        CheckpointFolder(folder, keep=1).save(25, content(25))
        assert newest(folder) == (content(25), [])
        assert {path.name for path in folder.iterdir()} == {"step_00000025.pt", "step_00000025.json"}

    @pytest.mark.parametrize("torn", ["no manifest", "half the data"])
    def test_a_torn_one_takes_no_place_of_a_whole_one(self, tmp_path: Path, torn: str) -> None:
        checkpoints = CheckpointFolder(tmp_path, keep=2)
        for step in (100, 105):
            checkpoints.save(step, content(step))
        newest = tmp_path / "step_00000105.pt"
        if torn == "no manifest":
            newest.with_suffix(".json").unlink()
        else:
            os.truncate(newest, 10)
        checkpoints.save(110, content(110))
        assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["step_00000100.pt", "step_00000110.pt"]
        os.truncate(tmp_path / "step_00000110.pt", 10)
        assert checkpoints.newest(lambda _: None) == content(100)

    def test_clear_removes_all_and_nothing_else(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("mine")
        (folder / "step_00000040.tmp").write_bytes(b"torn")
        CheckpointFolder(folder, keep=1).clear()
        assert [path.name for path in folder.iterdir()] == ["notes.txt"]


class TestKillWhileWriting:
    """What each moment of a write leaves behind, and that it harms nothing."""

    @pytest.mark.parametrize("moment", ["in_the_data", "before_the_manifest", "in_pruning"])
    def test_the_one_before_stays_and_the_next_write_tidies_up(self, folder: Path, moment: str) -> None:
        if moment == "in_the_data":
            (folder / "step_00000040.tmp").write_bytes(content(40)[:100])
            expected, told = content(30), 0
        elif moment == "before_the_manifest":
            (folder / "step_00000040.pt").write_bytes(content(40))
            expected, told = content(30), 1
        else:
            (folder / "step_00000010.json").unlink()
            expected, told = content(30), 0
        data, warnings = newest(folder)
        assert data == expected
        assert len(warnings) == told
        for step in (40, 50):
            CheckpointFolder(folder, keep=2).save(step, content(step))
        kept = {f"step_000000{step}.{kind}" for step in (40, 50) for kind in ("pt", "json")}
        assert {path.name for path in folder.iterdir()} == kept

    def test_a_write_that_is_killed_anywhere_leaves_a_whole_checkpoint(self, tmp_path: Path) -> None:
        """The process dies at its n-th system call that changes a file, for each n."""
        for call_number in range(1, 12):
            folder = tmp_path / str(call_number)
            CheckpointFolder(folder, keep=1).save(10, content(10))
            try:
                run_ranks(_save_and_die, 1, folder, call_number)
            except RanksFailed:
                data, _ = newest(folder)
                assert data in (content(10), content(20)), f"after call {call_number}"
            else:
                assert newest(folder) == (content(20), [])
                assert call_number > 4, "the calls were counted"
                return
        pytest.fail("the write never came to its end")


def _save_and_die(_: Launch, folder: Path, call_number: int) -> None:
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call_number:
                os.kill(os.getpid(), 9)
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "unlink", "rename", "open"):
        setattr(os, name, counted(getattr(os, name)))
    CheckpointFolder(folder, keep=1).save(20, content(20))


# ---- what is inside


def state() -> TrainState:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    return TrainState(
        step=7,
        images_consumed=70,
        order_fingerprint="ab",
        data={"training set": {"images": 7, "class_names": ["a", "b"], "fingerprint": "cd"}},
        devices=["CPU with AVX2"],
        skipped_steps=1,
        skipped_images=2,
        absent={3: [0, 5]},
        virtual_workers=4,
        world_size=2,
        resize=None,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        ema={"weight": torch.ones(3, 2)},
        loss_scale={},
        reduction={"bound": torch.tensor([0.5, 2.0]), "steps": 12},
        interval={"sums": {"loss": torch.tensor(1.5), "wrong": torch.tensor(3.0)}, "steps": 2},
        recent_top1_errors=[12.5],
        last_validation={"val/loss": 0.25},
        best={"metric": "val/loss", "value": 0.25, "step": 6, "weights_sha256": "ef"},
        seconds=1.0,
        train_seconds=0.5,
    )


def test_a_state_survives_the_round_trip() -> None:
    before = state()
    after = deserialise(serialise(before), CPU)
    assert after.__dict__.keys() == before.__dict__.keys()
    assert (after.step, after.recent_top1_errors, after.last_validation) == (7, [12.5], {"val/loss": 0.25})
    assert after.absent == {3: [0, 5]}
    assert torch.equal(after.model["weight"], before.model["weight"])
    momentum = [s["momentum_buffer"] for s in before.optimizer["state"].values()]
    restored = [s["momentum_buffer"] for s in after.optimizer["state"].values()]
    assert all(torch.equal(one, other) for one, other in zip(momentum, restored, strict=True))
    assert any(buffer.any() for buffer in restored)


class _Bomb:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self._trace,)


def bomb_in_zip(trace: Path, path: Path) -> None:
    torch.save({"format": 1, "model": _Bomb(trace)}, path)


def bomb_in_bare_pickle(trace: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(_Bomb(trace), protocol=2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train_digits(folder, 1)
    return folder


class TestRunsCheckpoints:
    """The same through `largebatch train`: a run whose last part is yet to be done."""

    @pytest.fixture
    def run_dir(self, finished: Path, tmp_path: Path) -> Path:
        copy = Path(shutil.copytree(finished, tmp_path / "run"))
        for name in ("model.pt", "summary.json"):
            (copy / name).unlink()
        assert saved_steps(copy) == [15, 16]
        return copy

    def test_falls_back_and_comes_to_the_same_end(self, finished: Path, run_dir: Path) -> None:
        flip(3)(run_dir / "checkpoints/step_00000016.pt")
        outcome = train_digits(run_dir, 2)[0]
        assert "warning: checkpoint" in outcome.out
        assert "step_00000016" in outcome.out
        assert "resuming from step 15 of 16" in outcome.out
        assert tensor_hashes(run_dir) == tensor_hashes(finished)
        assert records(run_dir) == records(finished)

    def test_with_none_left_it_starts_from_0_and_says_so(self, finished: Path, run_dir: Path) -> None:
        for step in (15, 16):
            truncate(1000)(run_dir / f"checkpoints/step_000000{step}.pt")
        outcome = train_digits(run_dir, 1)[0]
        assert "starts over from step 0" in outcome.out
        assert "resuming" not in outcome.out
        assert tensor_hashes(run_dir) == tensor_hashes(finished)
        assert records(run_dir) == records(finished)

    @pytest.mark.parametrize("make_bomb", [bomb_in_zip, bomb_in_bare_pickle])
    def test_a_pickle_with_a_right_checksum_is_not_executed(
        self, run_dir: Path, tmp_path: Path, make_bomb: Callable[[Path, Path], None]
    ) -> None:
        trace, made = tmp_path / "trace", tmp_path / "bomb.pt"
        make_bomb(trace, made)
        checkpoints = CheckpointFolder(run_dir / "checkpoints", keep=2)
        checkpoints.save(17, made.read_bytes())
        outcome = call("train", DIGITS, "--run-dir", run_dir, *SMALL)
        assert not trace.exists()
        assert outcome.status == 2
        assert "more than tensors and plain values" in outcome.err
        assert "Traceback" not in outcome.err

    def test_whole_bytes_that_are_no_checkpoint_are_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("a", "b")
        torch.save([1, 2], tmp_path / "list.pt")
        torch.save({"format": 1}, tmp_path / "part.pt")
        for data in (b"", b"garbage", serialise(state())[:-100], *(p.read_bytes() for p in tmp_path.glob("*.pt"))):
            with pytest.raises(DataError):
                deserialise(data, CPU)
