"""Asked to stop, the ranks agree on a step, write a checkpoint and exit with 75; the same command goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from run_folders import Outcome, records, saved_steps, tensor_hashes
from survive import Fleet, newest_step, run_to_the_end, slow_steps, training

from largebatch.training import preemption
from largebatch.training.trainer import Trainer

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_to_the_end(1, folder)
    return folder


def step_stopped_at(outcomes: list[Outcome], run_dir: Path) -> int:
    """All ranks say the same step; its checkpoint is the newest, and whole."""
    assert [outcome.status for outcome in outcomes] == [75] * len(outcomes)
    step = newest_step(run_dir)
    for outcome in outcomes:
        assert f"stopped by a signal after step {step}, with a checkpoint" in outcome.err
        assert "Traceback" not in outcome.err
    return step


def assert_goes_on(undisturbed: Path, run_dir: Path, step: int, world_size: int) -> None:
    assert f"resuming from step {step} of 16" in run_to_the_end(world_size, run_dir)[0].out
    assert tensor_hashes(run_dir) == tensor_hashes(undisturbed)
    assert records(run_dir) == records(undisturbed)


@pytest.mark.parametrize(
    ("world_size", "number", "victims", "times", "then"),
    [(2, TERM, (0, 1), 1, 3), (3, USR1, (1,), 1, 2), (2, TERM, (0, 1), 2, 1)],
    ids=["both_ranks", "one_of_three", "twice_at_once"],
)
def test_signalled_ranks_stop_together(
    undisturbed: Path, tmp_path: Path, world_size: int, number: signal.Signals, victims: Any, times: int, then: int
) -> None:
    with Fleet(world_size, *training(tmp_path), prepare=slow_steps) as fleet:
        fleet.until(lambda: newest_step(tmp_path) >= 3)
        for _ in range(times):
            fleet.send(number, *victims)
        step = step_stopped_at(fleet.outcomes(), tmp_path)
    assert 3 <= step < 16
    assert_goes_on(undisturbed, tmp_path, step, then)


def _signal_myself(rank: int, when: str) -> None:
    run, evaluate = Trainer.run, Trainer._evaluate

    def signalled(trainer: Trainer, number: signal.Signals) -> None:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 30
        while not trainer.stop_request.asked and time.monotonic() < deadline:
            time.sleep(0.001)  # a thread takes the signal

    def before_the_first_step(self: Trainer, *inputs: Any) -> None:
        signalled(self, USR1)
        run(self, *inputs)

    def while_evaluating(self: Trainer) -> Any:
        if rank == 1:
            signalled(self, TERM)
        return evaluate(self)

    if when == "before the first step":
        Trainer.run = before_the_first_step  # type: ignore[method-assign]
    else:
        Trainer._evaluate = while_evaluating  # type: ignore[method-assign]


@pytest.mark.parametrize(("when", "step"), [("before the first step", 1), ("while evaluating", 9)])
def test_signalled_between_steps(undisturbed: Path, tmp_path: Path, when: str, step: int) -> None:
    # One step is done at least, so that a job that is always signalled early comes to its end all the same.
    often = "evaluation.every_epochs=1"
    with Fleet(2, *training(tmp_path, often), prepare=_signal_myself, prepare_args=(when,)) as fleet:
        assert step_stopped_at(fleet.outcomes(), tmp_path) == step
    run_to_the_end(1, tmp_path, often)
    assert tensor_hashes(tmp_path) == tensor_hashes(undisturbed)


def test_a_rank_that_still_waits_for_the_others_is_ended(tmp_path: Path) -> None:
    with Fleet(1, *training(tmp_path), environ=lambda _: {"WORLD_SIZE": "2"}) as fleet:
        fleet.until((fleet.folder / "store").exists)
        fleet.send(TERM)
        assert fleet.outcomes()[0].status == -TERM


def test_signalled_in_the_last_evaluation_it_just_ends(undisturbed: Path, tmp_path: Path) -> None:
    with Fleet(2, *training(tmp_path), prepare=_signal_myself, prepare_args=("at the end",)) as fleet:
        assert [outcome.status for outcome in fleet.outcomes()] == [0, 0]
    assert tensor_hashes(tmp_path) == tensor_hashes(undisturbed)
    assert saved_steps(tmp_path)[-1] == 16


GRACE = 2.0


def _little_grace(rank: int) -> None:
    preemption._SAME_REQUEST_SECONDS = GRACE
    slow_steps(rank)


def test_a_second_signal_ends_a_rank_at_once_though_it_waits_for_another(tmp_path: Path) -> None:
    with Fleet(2, *training(tmp_path), prepare=_little_grace) as fleet:
        fleet.until(lambda: newest_step(tmp_path) >= 3)
        fleet.send(signal.SIGSTOP, 1)  # rank 0 waits for it in the middle of a step
        time.sleep(0.5)
        fleet.send(TERM, 0)
        fleet.send(TERM, 0)  # passed on by a launcher: the same request
        time.sleep(GRACE + 2)
        assert fleet.processes[0].is_alive()
        fleet.send(TERM, 0)
        (outcome,) = fleet.outcomes(timeout=30, ranks=[0])
    assert outcome.status == 128 + TERM
