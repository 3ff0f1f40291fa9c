"""Our step against hand-written DistributedDataParallel: weak-scaling efficiency at N = 2, paired and interleaved.

    torchrun --standalone --nproc-per-node=2 benchmarks/ddp_comparison.py \\
        --config benchmark/resnet20_cpu --json results/benchmark/ddp_comparison.json

Both run the same model, precision, optimizer and micro-batches on the same synthetic images; the hand-written loop is
the usual one: `no_sync` in all micro-batches but the last, no BatchNorm statistics over all workers, no loss or error
over all ranks, and buffers not broadcast, which makes DDP quicker than its default. Each round has a window of four
things: ours and the plain loop, on one rank without DDP and on two with it. The figure is the ratio of efficiencies,
ours over DDP's, each time(N = 1) / time(N = 2): ours over plain at N = 2 over the same at N = 1, each the median of
windows that lie next to each other in time, so that a noisy machine is as noisy to both. The efficiencies themselves
are not given: medians of their own, they do not divide to that ratio, and four programs that take turns on the same
caches are each slower than alone (`largebatch benchmark` measures them). Windows are short and many,
for the same reason; the interval is where 95 % of the ratios lie when the rounds are resampled (bootstrap).
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from largebatch.benchmark.cases import Case
from largebatch.benchmark.harness import Harness
from largebatch.config import Config
from largebatch.configfile.loading import load_config
from largebatch.data.load import Sources, load
from largebatch.distributed.environment import Ranks, connect, read_launch
from largebatch.distributed.subgroups import Subgroups
from largebatch.report.environment import describe_environment
from largebatch.run import build_model
from largebatch.training.optimizer import make_optimizer, set_lr
from largebatch.training.precision import make_autocast

LR = 1e-4
ENVIRONMENT = ("platform", "python", "packages", "cpu", "memory", "threads", "git")


class Plain:
    """The loop that one would write by hand, for `micro_batches` of n images a rank."""

    def __init__(self, config: Config, ranks: Ranks, sources: Sources, micro_batches: int) -> None:
        self._ranks, self._micro_batches = ranks, micro_batches
        self._model: nn.Module = build_model(config, sources[0], ranks)
        self._optimizer = make_optimizer(self._model, config.optimizer)
        set_lr(self._optimizer, LR)
        if ranks.distributed:
            self._model = with_ddp(self._model, ranks, config.execution.bucket_mb)
        self._model.train()
        self._autocast = make_autocast(config.execution.precision, ranks.device)
        channels_last = config.execution.channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        n = config.batch.images_per_worker
        self._images = torch.randn(n, *sources[0].shape, device=ranks.device).contiguous(memory_format=layout)
        self._labels = torch.randint(sources[0].classes, (n,), device=ranks.device)

    def window(self, steps: int) -> float:
        """Seconds of a step."""
        self._step()
        self._ranks.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        return (time.perf_counter() - start) / steps

    def _step(self) -> None:
        self._optimizer.zero_grad()
        for number in range(self._micro_batches):
            last = number == self._micro_batches - 1
            wait = isinstance(self._model, DistributedDataParallel) and not last
            with self._model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with self._autocast():
                    loss = F.cross_entropy(self._model(self._images), self._labels)
                (loss / self._micro_batches).backward()
        self._optimizer.step()


class Ours:
    """The same of ours: the step of `train`."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        harness.warm_up()

    def window(self, steps: int) -> float:
        """Seconds of a step."""
        return self._harness.window("exchange", steps)[-1] / steps


def with_ddp(model: nn.Module, ranks: Ranks, bucket_mb: float) -> DistributedDataParallel:
    """DDP with its own all-reduce, and its buffers left alone."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"process_group": ranks.group, "bucket_cap_mb": bucket_mb, buffers: False}
    return DistributedDataParallel(model, **options)


def compare(
    config: Config, workers: int, groups: Subgroups, sources: Sources, arguments: argparse.Namespace
) -> dict[str, Any] | None:
    """The ratio of efficiencies at `workers` virtual workers a rank; None off rank 0."""
    running: list[tuple[str, Ranks, Plain | Ours, int]] = []
    for size in (1, 2):
        members = groups.first(size, ddp=size > 1)
        if members is not None:
            case = Case(size, size * workers, ddp=size > 1).config(config)
            for name, loop in (
                ("ours", Ours(Harness(case, members, sources))),
                ("plain", Plain(case, members, sources, workers)),
            ):
                loop.window(1)
                seconds = max(members.gather(loop.window(2)))
                running.append((f"{name} {size}", members, loop, math.ceil(arguments.window_seconds / seconds)))
        groups.sleep()
    windows: dict[str, list[float]] = {name: [] for name, *_ in running}
    for number in range(arguments.rounds):
        for size in (1, 2) if number % 2 == 0 else (2, 1):
            here = [r for r in running if r[1].world_size == size]
            for name, members, loop, steps in here if number % 4 < 2 else reversed(here):
                windows[name].append(max(members.gather(loop.window(steps))))
            groups.sleep()
    return summary(windows, workers) if len(windows) == 4 else None


def summary(windows: dict[str, list[float]], workers: int) -> dict[str, Any]:
    """Medians and spreads of the paired rounds."""
    one, two = (
        [p / o for p, o in zip(windows[f"plain {size}"], windows[f"ours {size}"], strict=True)] for size in (1, 2)
    )
    return {
        "workers_per_rank": workers,
        "rounds": len(one),
        "ratio_of_efficiencies": statistics.median(two) / statistics.median(one),
        "interval": bootstrap_interval(one, two),
        "speed_over_plain": {"1": statistics.median(one), "2": statistics.median(two)},
        "windows": windows,
    }


def bootstrap_interval(one: list[float], two: list[float], draws: int = 2000) -> list[float]:
    """Where the middle 95 % of the ratio of medians lie when the rounds are resampled with replacement."""
    generator = random.Random(0)
    found = []
    for _ in range(draws):
        rounds = generator.choices(range(len(one)), k=len(one))
        found.append(statistics.median(two[r] for r in rounds) / statistics.median(one[r] for r in rounds))
    cuts = statistics.quantiles(found, n=40)
    return [cuts[0], cuts[-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--workers", default="1,4", help="virtual workers a rank")
    parser.add_argument("--reduction", action="append", choices=("reproducible", "fast"), help="default: both")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--window-seconds", type=float, default=0.15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    config = load_config(arguments.config, [], Config)
    with connect(read_launch(), device=config.execution.device, threads=config.execution.threads) as ranks:
        sources = load(config.data, seed=config.seed, device=ranks.device)
        groups = Subgroups(ranks, [2])
        for reduction in arguments.reduction or ("reproducible", "fast"):
            config = load_config(arguments.config, [f"execution.reduction={reduction}"], Config)
            for workers in map(int, arguments.workers.split(",")):
                result = compare(config, workers, groups, sources, arguments)
                if result is not None:
                    found.append({"reduction": reduction, **result})
                    print(
                        f"{reduction}, {workers} workers a rank: images/s over plain DDP's "
                        f"{result['speed_over_plain']['1']:.3f} (N=1), {result['speed_over_plain']['2']:.3f} (N=2); "
                        f"ratio of efficiencies, one over the other, {result['ratio_of_efficiencies']:.3f} "
                        f"({result['interval'][0]:.3f} to {result['interval'][1]:.3f})",
                        flush=True,
                    )
        if ranks.is_main and arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            environment = {name: value for name, value in describe_environment().items() if name in ENVIRONMENT}
            result = {"environment": environment, "config": config.model_dump(mode="json"), "found": found}
            arguments.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
