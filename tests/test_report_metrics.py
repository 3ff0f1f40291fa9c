"""Each step once, in the JSON lines and to TensorBoard's own reader, whatever was killed before."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from largebatch.errors import DataError
from largebatch.report.metrics import open_writers, read_metrics


def record(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "epoch": step / 10, "train/loss": 1 / (1 + step), **more}


def write_steps(run_dir: Path, steps: range, first_step: int = 0) -> None:
    writer = open_writers(run_dir, is_main=True, first_step=first_step)
    for step in steps:
        writer.write(record(step))
    writer.close()


def tensorboard_steps(run_dir: Path, tag: str) -> list[int]:
    return [event.step for event in tensorboard_events(run_dir, tag)]


def tensorboard_events(run_dir: Path, tag: str) -> list:
    reader = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return reader.Scalars(tag)


def json_steps(run_dir: Path) -> list[int]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_records_reach_both_with_their_values(tmp_path: Path) -> None:
    writer = open_writers(tmp_path / "run", is_main=True, first_step=0)
    writer.write({"step": 1, "epoch": 0.5, "train/loss": 2.25})
    writer.write({"step": 2, "epoch": 1.0, "train/loss": 1.5, "val/top1_error": 12.5, "lr": 0.1})
    writer.close()
    records = read_metrics(tmp_path / "run")
    assert [{k: v for k, v in r.items() if k != "time"} for r in records] == [
        {"step": 1, "epoch": 0.5, "train/loss": 2.25},
        {"step": 2, "epoch": 1.0, "train/loss": 1.5, "val/top1_error": 12.5, "lr": 0.1},
    ]
    assert records[0]["time"] <= records[1]["time"]
    losses = tensorboard_events(tmp_path / "run", "train/loss")
    assert [(e.step, e.value) for e in losses] == [(1, 2.25), (2, 1.5)]
    assert [e.wall_time for e in losses] == [r["time"] for r in records]
    assert [(e.step, e.value) for e in tensorboard_events(tmp_path / "run", "val/top1_error")] == [(2, 12.5)]


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = open_writers(tmp_path, is_main=True, first_step=0)
    writer.write(record(1))
    assert json_steps(tmp_path) == [1]
    writer.close()


def test_what_is_not_finite_stays_valid_json(tmp_path: Path) -> None:
    writer = open_writers(tmp_path, is_main=True, first_step=0)
    writer.write({"step": 1, "epoch": 0.0, "train/loss": math.nan, "val/loss": math.inf})
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=refuse)
    assert values["train/loss"] is None
    assert values["val/loss"] is None
    assert math.isnan(tensorboard_events(tmp_path, "train/loss")[0].value)


def test_a_resumed_run_holds_each_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 21))
    write_steps(tmp_path, range(13, 25), first_step=13)
    write_steps(tmp_path, range(8, 31), first_step=8)
    assert json_steps(tmp_path) == list(range(1, 31))
    assert tensorboard_steps(tmp_path, "train/loss") == list(range(1, 31))
    assert tensorboard_steps(tmp_path, "epoch") == list(range(1, 31))
    times = [r["time"] for r in read_metrics(tmp_path)]
    assert [e.wall_time for e in tensorboard_events(tmp_path, "train/loss")] == times


def test_a_run_from_the_start_drops_everything_old(tmp_path: Path) -> None:
    write_steps(tmp_path, range(6))
    write_steps(tmp_path, range(1, 3))
    assert json_steps(tmp_path) == [1, 2]
    assert tensorboard_steps(tmp_path, "train/loss") == [1, 2]


@pytest.mark.parametrize("torn", ['{"step": 5, "epo', '{"step": 5, "epoch": 0.5, "train/loss": 0.1}', "{"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    write_steps(tmp_path, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
    write_steps(tmp_path, range(5, 7), first_step=5)
    assert json_steps(tmp_path) == list(range(1, 7))
    assert tensorboard_steps(tmp_path, "train/loss") == list(range(1, 7))


KILLED = """
import os, signal, sys
from pathlib import Path
from largebatch.report.metrics import open_writers
writer = open_writers(Path(sys.argv[1]), is_main=True, first_step=0)
for step in range(1, 40):
    writer.write({"step": step, "epoch": step / 10, "train/loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_nothing_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    """The checkpoint of step 25 was written; TensorBoard's writer died with events in its hands."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert json_steps(tmp_path) == list(range(1, 40))
    write_steps(tmp_path, range(26, 51), first_step=26)
    assert json_steps(tmp_path) == list(range(1, 51))
    assert tensorboard_steps(tmp_path, "train/loss") == list(range(1, 51))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "rubbish\n" + lines[2])
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: 'rubbish'"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        open_writers(tmp_path, is_main=True, first_step=9)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path)


def test_a_step_twice_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    writer = open_writers(tmp_path, is_main=True, first_step=3)
    with pytest.raises(AssertionError):
        writer.write(record(2))
    writer.close()


def test_off_the_main_rank_nothing_is_touched(tmp_path: Path) -> None:
    writer = open_writers(tmp_path / "run", is_main=False, first_step=0)
    writer.write(record(1))
    writer.close()
    assert os.listdir(tmp_path) == []
