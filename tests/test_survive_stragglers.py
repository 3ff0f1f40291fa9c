"""A rank that computes slower than the others is named: in the log, in metrics.jsonl and in TensorBoard."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from run_folders import DIGITS, SMALL, Outcome, call, tensor_hashes, train_digits
from torch.futures import Future

from largebatch.distributed.environment import Launch
from largebatch.training.stopwatch import HostStopwatch, TimedAllReduce

NAP = 0.25


def _train_slowly(launch: Launch, slow: int, arguments: list[str]) -> Outcome:
    """Rank `slow` sleeps in the forward of each pass of step 6, 7 and 8."""
    from largebatch.training.virtual_workers import VirtualWorkers

    forward = VirtualWorkers.__call__
    passes = 0

    def nap(self: VirtualWorkers, *inputs: object) -> object:
        nonlocal passes
        logits = forward(self, *inputs)
        here = len(self.workers_by_pass)
        if launch.rank == slow and 6 <= passes // here < 9:
            time.sleep(NAP / here)
        passes += 1
        return logits

    VirtualWorkers.__call__ = nap  # type: ignore[method-assign]
    return call(*arguments)


def timings(run_dir: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


@pytest.mark.parametrize(("world_size", "slow"), [(2, 1), (3, 0)])
def test_a_slow_rank_is_named(tmp_path: Path, world_size: int, slow: int) -> None:
    # Three ranks have 2, 3 and 3 of the 8 workers: it is the time of a pass that counts.
    command = ["train", DIGITS, "--run-dir", str(tmp_path), *SMALL, "health.straggler_factor=4"]
    outcomes = run_ranks(_train_slowly, world_size, slow, command)
    assert [outcome.status for outcome in outcomes] == [0] * world_size
    assert f"warning: rank {slow} on {socket.gethostname()} computes" in outcomes[0].out
    # Steps 6 to 8 are in the records after 8 and 9, and nowhere else.
    napped = timings(tmp_path)[8]
    assert napped["slowest_rank"] == slow
    assert napped["slowdown"] > 4
    assert timings(tmp_path)[6]["compute"] < NAP

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("slowest_rank")}
    assert shown[8] == slow
    assert {event.step for event in events.Scalars("slowdown")} == shown.keys() == timings(tmp_path).keys()


def test_one_rank_alone_has_its_compute_time_and_nobody_to_compare_with(tmp_path: Path) -> None:
    outcomes = train_digits(tmp_path, 1)
    assert "slower" not in outcomes[0].out
    for line in timings(tmp_path).values():
        assert line["compute"] > 0
        assert line["compute"] + line["data_wait"] < 32 / line["images_per_second"]
        assert "slowest_rank" not in line
    assert tensor_hashes(tmp_path)


class _SlowExchange:
    """Something to wait for."""

    def start(self, parts: list[torch.Tensor]) -> Future[torch.Tensor]:
        time.sleep(0.05)
        total: Future[torch.Tensor] = Future()
        total.set_result(parts[-1])
        return total

    def flush(self) -> None:
        time.sleep(0.05)


def test_waiting_for_other_ranks_is_not_computing() -> None:
    watch = HostStopwatch()
    exchange = TimedAllReduce(_SlowExchange(), watch)
    exchange.start([torch.zeros(1)])
    assert not watch.running, "it was not running before"
    started = time.perf_counter()
    watch.go()
    time.sleep(0.02)
    for _ in range(3):
        exchange.start([torch.zeros(1)])
    assert watch.running
    exchange.flush()
    assert not watch.running
    waited_at_least = 4 * 0.05
    assert 0.02 <= watch.read() <= time.perf_counter() - started - waited_at_least
    assert watch.read() == 0
