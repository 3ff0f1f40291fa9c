"""A rank that computes slower than the others is named: in the log, in metrics.jsonl and in TensorBoard."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from run_folders import tensor_hashes, train_digits
from torch.futures import Future

from largebatch.distributed.environment import Launch, connect
from largebatch.training.virtual_workers import VirtualWorkers

NAP = 0.25
ONE_EPOCH = ["schedule.epochs=1", "schedule.decay.kind=none"]


def timings(run_dir: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


@pytest.mark.parametrize(("world_size", "slow"), [(2, 1), (3, 0)])
def test_a_slow_rank_is_named(tmp_path: Path, world_size: int, slow: int) -> None:
    # Three ranks have 2, 3 and 3 of the 8 workers: it is the time of a pass that counts.
    delays = f"execution.delays={{seconds: 0.01, slow_ranks: [{slow}], slow_factor: 15}}"
    outcomes = train_digits(tmp_path, world_size, *ONE_EPOCH, delays, "health.straggler_factor=2")
    assert f"warning: rank {slow} on {socket.gethostname()} computes" in outcomes[0].out
    assert timings(tmp_path)[8]["slowest_rank"] == slow
    assert timings(tmp_path)[8]["slowdown"] > 2

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
    """Sums that take their time."""

    def start(self, buffer: torch.Tensor) -> Future[torch.Tensor]:
        total: Future[torch.Tensor] = Future()
        threading.Timer(NAP, total.set_result, (buffer,)).start()
        return total


def _step_with_a_slow_exchange(launch: Launch) -> tuple[float, float]:
    model = torch.nn.Linear(4, 2)
    with connect(launch, device="cpu") as ranks:
        virtual = VirtualWorkers(model, ranks, virtual_workers=4)
        started = time.perf_counter()
        with virtual.exchange_by(_SlowExchange()), virtual.step(0) as passes:
            for _ in passes:
                virtual.backward(virtual(torch.ones(3, 4)).mean())
        return virtual.own_compute.read(), time.perf_counter() - started


def test_waiting_for_other_ranks_is_not_computing() -> None:
    for own, whole in run_ranks(_step_with_a_slow_exchange, 2):
        assert 0 < own <= whole - NAP
