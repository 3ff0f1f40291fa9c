"""Under torchrun itself, and what the others do when one rank fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import DIGITS, ROOT, SMALL, call_on, records, summary, tensor_hashes

INSTANT = str(ROOT / "configs/instant/resnet8_fp32.yaml")
# A set of one's own that has something to say on rank 1 only.
OWN_SET = """
import os
import torch
from largebatch.errors import DataError

def load():
    if os.environ["RANK"] == "1":
        raise {error}
    images, labels = torch.zeros(64, 1, 8, 8, dtype=torch.uint8), torch.arange(64) % 10
    return (images, labels), (images, labels)
"""


def torchrun(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """``torchrun --standalone --nproc-per-node=2 -m largebatch``; after two minutes all of it is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "largebatch"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"torchrun hung\n{out}\n{err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def own_set(folder: Path, error: str) -> list[str]:
    """Overrides that name a set which raises `error` on rank 1; its module lies in `folder`."""
    (folder / "own_set_for_test.py").write_text(OWN_SET.format(error=error))
    return ["data.name=own_set_for_test:load", "data.train_images=64", "batch.images_per_worker=4"]


def test_two_ranks_under_torchrun_write_what_one_rank_writes(tmp_path: Path) -> None:
    done = torchrun("train", INSTANT, "--run-dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("plan of resnet8_fp32") == 1, "rank 0 alone speaks"
    assert "2, each running 2 virtual workers" in done.stdout
    assert "finished: top-1 error" in done.stdout
    (alone,) = call_on(1, "train", INSTANT, "--run-dir", tmp_path / "one")
    assert alone.status == 0, alone.err
    assert tensor_hashes(tmp_path / "two") == tensor_hashes(tmp_path / "one")
    assert records(tmp_path / "two") == records(tmp_path / "one")
    assert summary(tmp_path / "two")["world_size"] == 2


def test_a_rank_that_fails_under_torchrun_ends_the_job(tmp_path: Path) -> None:
    overrides = own_set(tmp_path, 'DataError("image 7 is damaged")')
    done = torchrun("train", DIGITS, "--run-dir", tmp_path / "run", *SMALL, *overrides, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "[rank 1] image 7 is damaged" in done.stderr.splitlines()
    assert "[rank 1] Traceback" not in done.stderr
    assert not (tmp_path / "run/model.pt").exists()


def test_a_config_error_under_torchrun_is_said_once(tmp_path: Path) -> None:
    done = torchrun("train", INSTANT, "--run-dir", tmp_path / "run", "schedule.epocs=1")
    assert done.returncode != 0
    assert done.stderr.count("schedule.epocs: no such key") == 1
    assert "[rank 0] command line: schedule.epocs" in done.stderr
    assert not (tmp_path / "run").exists()


class TestOneRankFails:
    """Nobody kills the others here: they must end by themselves."""

    @pytest.fixture(autouse=True)
    def _importable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(tmp_path)

    def test_by_bad_data(self, tmp_path: Path) -> None:
        overrides = own_set(tmp_path, 'DataError("image 7 is damaged")')
        outcomes = call_on(3, "train", DIGITS, "--run-dir", tmp_path / "run", *SMALL, *overrides)
        assert outcomes[1].status == 2
        assert outcomes[1].err == "[rank 1] image 7 is damaged\n"
        for rank in (0, 2):
            assert outcomes[rank].status == 1
            assert outcomes[rank].err.startswith(f"[rank {rank}] ")

    def test_by_a_bug_of_the_users_own_function(self, tmp_path: Path) -> None:
        overrides = own_set(tmp_path, 'ZeroDivisionError("a bug")')
        outcomes = call_on(2, "train", DIGITS, "--run-dir", tmp_path / "run", *SMALL, *overrides)
        assert [outcome.status for outcome in outcomes] == [1, 2]
        (line,) = outcomes[1].err.splitlines()
        assert line.startswith("[rank 1] data.name own_set_for_test:load: raised ZeroDivisionError: a bug (")


def test_too_many_ranks_are_refused_on_all_before_they_meet(tmp_path: Path) -> None:
    outcomes = call_on(3, "train", DIGITS, "--run-dir", tmp_path / "run", *SMALL, "batch.virtual_workers=2")
    assert [outcome.status for outcome in outcomes] == [2, 2, 2]
    assert "too few for 3 ranks" in outcomes[0].err
    assert [outcome.err for outcome in outcomes[1:]] == ["", ""]
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_rank_0_cannot_make_ends_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcomes = call_on(3, "train", DIGITS, "--run-dir", tmp_path / "file/run", *SMALL)
    assert [outcome.status for outcome in outcomes] == [2, 2, 2]
    for rank, outcome in enumerate(outcomes):
        assert outcome.err.startswith(f"[rank {rank}] --run-dir: ")


def test_a_damaged_metrics_file_ends_every_rank(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("garbage\n")
    outcomes = call_on(2, "train", DIGITS, "--run-dir", tmp_path, *SMALL)
    assert outcomes[0].status == 2
    assert f"[rank 0] {tmp_path}/metrics.jsonl:1" in outcomes[0].err
    assert outcomes[1].status != 0
