"""Steps that do not wait for all their workers: the mean is over those that arrived, and a record repeats it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import RanksFailed, run_ranks
from run_folders import DIGITS, SMALL, Outcome, call, call_on, saved_steps, summary, train_digits
from torch import Tensor, nn

from largebatch.cli import main
from largebatch.distributed.counter import StepCounter
from largebatch.distributed.environment import Launch, connect
from largebatch.recipe.batch import DeadlineSettings, Deal, deal_equally, deal_without
from largebatch.training.gates import Deadline, Enough
from largebatch.training.stragglers import Pace
from largebatch.training.virtual_workers import VirtualWorkers

K, N, STEPS, MOMENTUM = 7, 3, 6, 0.8


class Scripted:
    """Closes after as many passes as a hash of rank and step says."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def begin_step(self, step: int, deal: Deal) -> None:
        self._left = 1 + hashlib.sha256(f"{self._rank} {step}".encode()).digest()[0] % 3

    def pass_done(self) -> bool:
        self._left -= 1
        return self._left > 0

    def learn(self, pace: Pace) -> None:
        pass


def model() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)
    return nn.Sequential(*layers).double()


def batch(step: int, worker: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + worker)
    images = torch.randn(N, 1, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (N,), generator=generator)


Step = tuple[list[bool], float, float, list[np.ndarray]]
"""Who arrived, loss, sum of the workers' numbers, gradients and BatchNorm's statistics."""


def train(launch: Launch, reduction: str, absent: list[list[int]] | None = None) -> list[Step]:
    """With a scripted gate, or without those `absent` in each step."""
    net, steps = model(), []
    with connect(launch, device="cpu") as ranks:
        # Buckets of a parameter each, so that their order counts.
        virtual = VirtualWorkers(
            net, ranks, virtual_workers=K, reduction=reduction, batchnorm_momentum=MOMENTUM, drops=True, bucket_mb=1e-6
        )
        virtual.gate = Scripted(ranks.rank) if absent is None else None
        for step in range(STEPS):
            if absent is not None:
                virtual.deal = deal_without(deal_equally(K, 1, ranks.world_size), absent[step])
            with virtual.step(step) as passes:
                for workers in passes:
                    images, labels = batch(step, workers.start)
                    number = torch.tensor(workers.start)
                    virtual.backward(F.cross_entropy(virtual(images), labels), sums={"number": number})
            state = [p.grad.numpy().copy() for p in net.parameters() if p.grad is not None]
            state += [b.numpy().copy() for b in net.buffers()]
            steps.append((virtual.arrived.tolist(), virtual.loss.item(), virtual.sums["number"].item(), state))
    return steps


@pytest.mark.parametrize("reduction", ["reproducible", "fast"])
def test_all_means_are_over_the_workers_that_arrived(reduction: str) -> None:
    steps = run_ranks(train, 3, reduction)[0]
    counts = [sum(arrived) for arrived, *_ in steps]
    assert counts[:2] == [K, K], "DDP lays its buckets out anew after the first step"
    assert min(counts[2:]) < K
    assert len(set(counts)) > 1
    net = model()
    for step, (arrived, loss, number, state) in enumerate(steps):
        present = [worker for worker in range(K) if arrived[worker]]
        kept = {name: b.clone() for name, b in net.named_buffers()}
        losses, means, variances = [], [], []
        for worker in present:
            images, labels = batch(step, worker)
            losses.append(F.cross_entropy(net(images), labels))
            out = net[0](images)
            means.append(out.mean((0, 2, 3)))
            variances.append(out.var((0, 2, 3)))
        mean = torch.stack(losses).mean()
        gradients = torch.autograd.grad(mean, list(net.parameters()))
        with torch.no_grad():
            net[1].running_mean.copy_(kept["1.running_mean"].lerp(torch.stack(means).mean(0), 1 - MOMENTUM))
            net[1].running_var.copy_(kept["1.running_var"].lerp(torch.stack(variances).mean(0), 1 - MOMENTUM))
        net[1].num_batches_tracked.fill_(step + 1)
        assert (loss, number) == (pytest.approx(mean.item(), abs=1e-10), sum(present))
        for ours, expected in zip(state, [*gradients, *net.buffers()], strict=True):
            np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-10)


def test_a_replay_of_any_ranks_has_the_same_bits() -> None:
    recorded = run_ranks(train, 3, "reproducible")[0]
    absent = [[leaf for leaf in range(K) if not arrived[leaf]] for arrived, *_ in recorded]
    for world_size in (1, 2, 3):
        for (*numbers, state), (*expected, tensors) in zip(
            run_ranks(train, world_size, "reproducible", absent)[0], recorded, strict=True
        ):
            assert numbers == expected
            assert [a.tobytes() for a in state] == [a.tobytes() for a in tensors]


def test_a_deadline_is_a_share_over_the_usual_time_or_seconds() -> None:
    now = 0.0
    slack = Deadline(DeadlineSettings(slack=0.5), clock=lambda: now)
    fixed = Deadline(DeadlineSettings(seconds=4.0), clock=lambda: now)
    deal = deal_equally(8, 1, 3)
    for gate in (slack, fixed):
        gate.begin_step(0, deal)
    now = 1e6
    assert slack.pass_done(), "nothing is usual yet"
    assert not fixed.pass_done()
    for with_data in ([1, 1, 2], [1, 1, 2], [9, 9, 9]):  # the last is an odd record
        slack.learn(Pace([], [], with_data, 0, 1.0))
    slack.begin_step(1, deal)
    now += 4.4  # three passes of a second, and half of that
    assert slack.pass_done()
    now += 0.2
    assert not slack.pass_done()


def _dropped_by_count(launch: Launch) -> list[int]:
    """How many of 3 + 3 workers arrive when 3 are enough."""
    with connect(launch, device="cpu") as ranks:
        virtual = VirtualWorkers(model(), ranks, virtual_workers=6, batchnorm_momentum=MOMENTUM, drops=True)
        virtual.gate = Enough(3, StepCounter(ranks))
        counts = []
        for step in range(STEPS):
            with virtual.step(step) as passes:
                for workers in passes:
                    images, labels = batch(step, workers.start)
                    virtual.backward(F.cross_entropy(virtual(images), labels))
            counts.append(int(virtual.arrived.sum()))
        return counts


def test_with_backup_workers_no_pass_starts_once_enough_are_done() -> None:
    assert run_ranks(_dropped_by_count, 1) == [[3] * STEPS]
    # Two ranks: the pass that the other is in when the third is done may still arrive, and each has one at least.
    first, second = run_ranks(_dropped_by_count, 2)
    assert first == second
    assert first[:2] == [6, 6]
    assert all(3 <= count <= 4 for count in first[2:])


# A pass takes longer than the deadline, so a rank's second one is never started.
DROPS = ["batch.deadline.seconds=0.01", "execution.delays.seconds=0.02"]


def _until(_: Launch, run_dir: Path, step: int, arguments: list[str]) -> None:
    def wait() -> None:
        while max(saved_steps(run_dir), default=0) < step:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
    main(arguments)


def killed(world_size: int, run_dir: Path, step: int, *arguments: str) -> None:
    with pytest.raises(RanksFailed):
        run_ranks(_until, world_size, run_dir, step, [*arguments, "--run-dir", str(run_dir)])
    assert not (run_dir / "summary.json").exists()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that left workers out, killed on 3 ranks and resumed on 4."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    killed(3, folder, 6, "train", DIGITS, *SMALL, *DROPS)
    train_digits(folder, 4, *DROPS)
    return folder


def replay(recorded: Path, folder: Path, world_size: int) -> list[Outcome]:
    return call_on(world_size, "train", "--replay", recorded, "--run-dir", folder, "execution.delays.seconds=0")


def test_a_recorded_run_is_replayed_on_any_ranks_and_after_a_kill(recorded: Path, tmp_path: Path) -> None:
    absent = json.loads((recorded / "arrivals.json").read_text())["absent"]
    assert absent["2"] == "1 3 4 6 7", "the first passes of 3 ranks arrived"
    assert absent["15"] == "1 3 5 7", "those of 4"
    dropped = summary(recorded)["dropped_workers"]
    assert dropped == sum(len(leaves.split()) for leaves in absent.values())
    lines = [json.loads(line) for line in (recorded / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("dropped_workers", 0) for line in lines) == dropped
    killed(2, tmp_path / "3", 9, "train", "--replay", str(recorded))
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        for outcome in replay(recorded, folder, world_size):
            assert outcome.status == 0, outcome.err
        assert summary(folder)["weights_sha256"] == summary(recorded)["weights_sha256"]
        assert json.loads((folder / "arrivals.json").read_text())["absent"] == absent


def test_a_run_with_backup_workers_is_replayed_without_them(tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    backup = ["batch={virtual_workers: 5, backup_workers: 3, images_per_worker: 8}", "execution.delays.seconds=0.01"]
    for outcome in call_on(2, "train", DIGITS, *SMALL, *backup, "--run-dir", run):
        assert outcome.status == 0, outcome.err
    absent = json.loads((run / "arrivals.json").read_text())["absent"]
    assert absent
    # All three are backups; a pass that the other rank is in when the fifth is done still arrives.
    assert all(2 <= len(leaves.split()) <= 3 for leaves in absent.values())
    assert summary(run)["global_batch"] == 5 * 8
    assert replay(run, again, 1)[0].status == 0
    assert summary(again)["weights_sha256"] == summary(run)["weights_sha256"]


def test_what_cannot_be_replayed_is_refused(recorded: Path, tmp_path: Path) -> None:
    few = call_on(7, "train", "--replay", recorded, "--run-dir", tmp_path)[0]
    other = call("train", "--replay", recorded, "seed=3", "--run-dir", tmp_path)
    none = call("train", "--replay", tmp_path, "--run-dir", tmp_path / "run")
    for outcome, problem in ((few, "too few for 7 ranks"), (other, "seed: was 0, now 3"), (none, "no such file")):
        assert outcome.status == 2
        assert problem in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
