"""A rank that dies, hangs, fails or never fits: the others say which and why, and nobody waits for ever."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hangs import by_file, by_port
from survive import Fleet, newest_step, slow_steps, training

from largebatch import run, runfolder
from largebatch.data.known import Split
from largebatch.distributed import environment
from largebatch.errors import DataError
from largebatch.report.lock import hold_folder
from largebatch.training.trainer import Trainer

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
# Where a rank must be missed, and others not: a busy machine may stop any of them for some seconds.
TIMEOUT = 10.0
BRIEF = f"execution.timeout_minutes={TIMEOUT / 60}"
# Until they give up, ask each other, and end.
SOON = TIMEOUT + 45.0


@pytest.mark.parametrize(
    ("world_size", "victim", "number", "rendezvous"),
    [
        (2, 1, KILL, by_port),
        (3, 0, KILL, by_file),
        (2, 0, KILL, by_port),
        (3, 0, STOP, by_port),
    ],
)
def test_a_lost_rank_is_named(
    tmp_path: Path, world_size: int, victim: int, number: signal.Signals, rendezvous: Callable[[], Any]
) -> None:
    others = [rank for rank in range(world_size) if rank != victim]
    # One that is killed closes its connections, and is missed at once.
    command = training(tmp_path, *([BRIEF] if number == STOP else []))
    with Fleet(world_size, *command, environ=rendezvous(), prepare=slow_steps) as fleet:
        fleet.until(lambda: newest_step(tmp_path) >= 3)
        fleet.send(number, victim)
        for outcome in fleet.outcomes(timeout=SOON, ranks=others):
            assert outcome.status == 1
            assert f"rank {victim} died or hung" in outcome.err
            assert "Run the same command again" in outcome.err
            assert "Traceback" not in outcome.err
    assert newest_step(tmp_path) >= 3


def _fail_at_step_5(rank: int, victim: int) -> None:
    train_step = Trainer._train_step

    def fail(self: Trainer, *inputs: Any) -> Any:
        if self.step == 5 and rank == victim:
            raise DataError("photos/cat.jpg: cut off; fetch it again")
        return train_step(self, *inputs)

    Trainer._train_step = fail  # type: ignore[method-assign]


def test_an_error_of_one_rank_is_quoted_by_the_others(tmp_path: Path) -> None:
    with Fleet(3, *training(tmp_path), prepare=_fail_at_step_5, prepare_args=(1,)) as fleet:
        main, failed, last = fleet.outcomes(timeout=SOON)
    assert failed.status == 2
    assert failed.err.count("photos/cat.jpg: cut off") == 1
    for other in (main, last):
        assert other.status == 1
        assert "rank 1 failed: DataError: photos/cat.jpg: cut off" in other.err
        assert "died or hung" not in other.err


# ---- starts that do not fit together


def refused(environ: Callable[[int], dict[str, str]], *words: str, world_size: int = 2, arguments: Any = ()) -> None:
    """All ranks end soon with status 2, and say why."""
    with Fleet(world_size, *arguments, environ=environ) as fleet:
        for outcome in fleet.outcomes(timeout=SOON):
            assert outcome.status == 2, fleet.story()
            assert "Traceback" not in outcome.err
            for word in words:
                assert word in outcome.err


@pytest.mark.parametrize("rendezvous", [by_file, by_port])
def test_world_sizes_that_disagree(tmp_path: Path, rendezvous: Callable[[], Any]) -> None:
    base = rendezvous()
    # A timeout that nobody would wait for: they must not need it.
    command = training(tmp_path, "execution.timeout_minutes=10")
    refused(lambda r: {**base(r), "WORLD_SIZE": str(3 - r)}, "WORLD_SIZE=", arguments=command)


def _other_backend(rank: int) -> None:
    if rank == 1:
        environment.choose_backend = lambda *_: "nccl"


def test_backends_that_disagree(tmp_path: Path) -> None:
    with Fleet(2, *training(tmp_path, "execution.timeout_minutes=10"), prepare=_other_backend) as fleet:
        for outcome in fleet.outcomes(timeout=SOON):
            assert outcome.status == 2, fleet.story()
            assert "was started with WORLD_SIZE=2, backend" in outcome.err


def _wait_shortly(_: int) -> None:
    runfolder.hold_folder = lambda folder: hold_folder(folder, patience_seconds=0.5)


def test_a_folder_in_which_another_process_trains(tmp_path: Path) -> None:
    with hold_folder(tmp_path), Fleet(2, *training(tmp_path), prepare=_wait_shortly) as fleet:
        for outcome in fleet.outcomes(timeout=SOON):
            assert outcome.status == 2
            assert f"another process is training in {tmp_path}" in outcome.err


def test_two_processes_of_one_rank(tmp_path: Path) -> None:
    ranks = {0: "0", 1: "1", 2: "1"}
    refused(
        lambda r: {"RANK": ranks[r], "WORLD_SIZE": "3"},
        "two processes claim to be rank 1 of 3",
        world_size=3,
        arguments=training(tmp_path),
    )


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    refused(lambda _: {"WORLD_SIZE": "3"}, "rank 2 of 3 did not join", arguments=training(tmp_path, BRIEF))


def _lower_rate(rank: int) -> None:
    """Rank 1 is started with another override."""
    import survive

    command = survive.main

    def main(arguments: list[str]) -> int:
        return command([*arguments, "schedule.reference_lr=0.05"] if rank == 1 else arguments)

    survive.main = main


def _change_code(rank: int) -> None:
    if rank == 1:
        run.code_digest = lambda: "of another commit"


def _update_torch(rank: int) -> None:
    if rank == 1:
        torch.__version__ += ".1"


def _swap_images(rank: int) -> None:
    """On rank 1's machine the files of the data set are in another order."""
    from largebatch.data import load

    read = load.read_known

    def swapped(name: str, root: Path) -> tuple[Split, Split]:
        (images, labels), validation = read(name, root)
        return (images.flip(0), labels.flip(0)) if rank == 1 else (images, labels), validation

    load.read_known = swapped


@pytest.mark.parametrize(
    ("prepare", "what"),
    [
        (_lower_rate, "config"),
        (_change_code, "code of largebatch"),
        (_update_torch, "version of torch"),
        (_swap_images, "training set"),
    ],
)
def test_what_differs_between_ranks_is_named(tmp_path: Path, prepare: Callable[[int], None], what: str) -> None:
    with Fleet(3, *training(tmp_path), prepare=prepare) as fleet:
        for outcome in fleet.outcomes(timeout=SOON):
            assert outcome.status == 2
            assert f"the {what} on rank 1 is not that of rank 0" in outcome.err
    assert not (tmp_path / "metrics.jsonl").exists()
