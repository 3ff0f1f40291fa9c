"""Smaller groups within one launch, and the step without its exchange."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

from largebatch.distributed.allreduce import NoExchange
from largebatch.distributed.environment import Launch, Ranks, connect
from largebatch.distributed.subgroups import Subgroups
from largebatch.training.virtual_workers import VirtualWorkers


def _sums_and_gathers(launch: Launch) -> dict[str, Any]:
    with connect(launch, device="cpu") as ranks:
        groups = Subgroups(ranks, [1, 2, 3])
        seen: dict[str, Any] = {}
        for size in (1, 2, 3):
            members = groups.first(size)
            if members is not None:
                total = members.sum(torch.tensor([float(launch.rank + 1)]))
                members.barrier()
                seen[f"{size}"] = (total.item(), members.gather(launch.rank), members.broadcast(f"from {launch.rank}"))
            groups.sleep()
        return seen


def test_each_group_sums_gathers_and_broadcasts_among_its_own_ranks() -> None:
    results = run_ranks(_sums_and_gathers, 3)
    assert results[0] == {
        "1": (1.0, [0], "from 0"),
        "2": (3.0, [0, 1], "from 0"),
        "3": (6.0, [0, 1, 2], "from 0"),
    }
    assert [sorted(seen) for seen in results] == [["1", "2", "3"], ["2", "3"], ["3"]]


def _sleep_while_rank_0_works(launch: Launch) -> tuple[float, float]:
    with connect(launch, device="cpu") as ranks:
        groups = Subgroups(ranks, [1])
        groups.sleep()
        start, cpu = time.perf_counter(), time.process_time()
        if groups.first(1) is not None:
            time.sleep(1.0)
        groups.sleep()
        return time.perf_counter() - start, time.process_time() - cpu


def test_a_rank_outside_the_group_sleeps_until_the_others_are_done_without_using_the_cpu() -> None:
    for wall, cpu in run_ranks(_sleep_while_rank_0_works, 3):
        assert wall >= 0.99
        assert cpu < 0.2


def _one_rank_with_and_without_ddp(launch: Launch) -> list[list[float]]:
    with connect(launch, device="cpu", group_of_one=True) as ranks:
        groups = Subgroups(ranks, [1])
        alone, grouped = groups.first(1, ddp=False), groups.first(1)
        assert alone is not None
        assert grouped is not None
        assert (alone.distributed, grouped.distributed) == (False, True)
        return [_gradient(members).flatten().tolist() for members in (alone, grouped)]


def _model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def _images(leaf: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    return torch.sin(values + leaf), torch.tensor([0, 1, 1, 0])


def _gradient(members: Ranks, *, exchange: bool = True) -> torch.Tensor:
    model = _model()
    virtual = VirtualWorkers(model, members, virtual_workers=4)
    if exchange:
        _step(virtual)
    else:
        with virtual.exchange_by(NoExchange()):
            _step(virtual)
    assert model.weight.grad is not None
    return model.weight.grad


def _step(virtual: VirtualWorkers) -> None:
    with virtual.step(0) as passes:
        for workers in passes:
            images, labels = _images(workers.start)
            virtual.backward(F.cross_entropy(virtual(images), labels))


def _expected(leaves: range) -> torch.Tensor:
    """The gradient of the mean loss of four leaves, of which only `leaves` are added."""
    model = _model()
    losses = [F.cross_entropy(model(images), labels) for images, labels in map(_images, leaves)]
    (torch.stack(losses).sum() / 4).backward()
    assert model.weight.grad is not None
    return model.weight.grad


def test_one_rank_under_ddp_trains_as_one_without() -> None:
    alone, grouped = run_ranks(_one_rank_with_and_without_ddp, 1)[0]
    assert alone == grouped
    torch.testing.assert_close(torch.tensor(alone), _expected(range(4)).flatten())


def _pair_of_three(launch: Launch) -> dict[str, list[list[float]]] | None:
    with connect(launch, device="cpu") as ranks:
        groups = Subgroups(ranks, [2])
        pair = groups.first(2)
        seen = None
        if pair is not None:
            seen = {"exchanged": _gradient(pair).tolist(), "own": _gradient(pair, exchange=False).tolist()}
        groups.sleep()
        return seen


def test_a_pair_of_three_ranks_exchanges_gradients_and_without_exchange_each_keeps_its_own() -> None:
    first, second, outside = run_ranks(_pair_of_three, 3)
    assert outside is None
    for seen in (first, second):
        torch.testing.assert_close(torch.tensor(seen["exchanged"]), _expected(range(4)))
    torch.testing.assert_close(torch.tensor(first["own"]), _expected(range(2)))
    torch.testing.assert_close(torch.tensor(second["own"]), _expected(range(2, 4)))
