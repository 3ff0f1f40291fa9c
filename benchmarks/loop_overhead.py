"""What the loop costs: paired, interleaved windows of training steps in one process (or one launch).

python benchmarks/loop_overhead.py CONFIG OUT.json
    N = 1: `train_step` against a bare hand-written PyTorch loop with the same model, precision, memory
    format, micro-batches and data; the ratio is images/s of ours over the bare loop's.
torchrun --standalone --nproc-per-node=2 benchmarks/loop_overhead.py CONFIG OUT.json
    N > 1: reduction `reproducible` against `fast`.
python benchmarks/loop_overhead.py CONFIG OUT.json --noise-scale
    Steps that measure the gradient noise scale, each of them, against steps that do not.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from largebatch.config import Config
from largebatch.configfile.loading import load_config
from largebatch.data.load import load
from largebatch.data.source import ImageSource, Pass
from largebatch.distributed.environment import Ranks, connect
from largebatch.report.environment import describe_environment
from largebatch.report.files import write_json_atomically
from largebatch.run import build_model, unsaved_trainer
from largebatch.training.groups import parameter_groups
from largebatch.training.precision import make_autocast
from largebatch.training.step import TimedBatches, train_step

STEPS_PER_WINDOW = 1
PAIRS = 120
Window = Callable[[], None]


def our_window(
    config: Config, ranks: Ranks, sources: tuple[ImageSource, ImageSource], *, noise: bool = False
) -> Window:
    """A window of steps as `largebatch train` runs them; with `noise`, each measures the gradient noise scale."""
    if noise:
        config = config.model_copy(update={"logging": config.logging.model_copy(update={"noise_scale_every_steps": 1})})
    trainer = unsaved_trainer(config, ranks, sources)
    passes = (
        Pass(trainer.order.epoch_of(step), trainer.order.indices(step, workers))
        for step in itertools.count()
        for workers in trainer.virtual.workers_by_pass
    )
    batches = TimedBatches(trainer.train.stream(passes, augment=True), trainer.memory_format)
    steps = itertools.count()

    def window() -> None:
        for _ in range(STEPS_PER_WINDOW):
            step = next(steps)
            train_step(
                trainer.virtual,
                trainer.optimizer,
                batches,
                step=step,
                lr=0.01,
                autocast=trainer.autocast,
                loss_scale=trainer.loss_scale,
                measure_noise=noise,
            )
        _wait(ranks)

    return window


def bare_window(config: Config, ranks: Ranks, sources: tuple[ImageSource, ImageSource]) -> Window:
    """The same in plain PyTorch: accumulate k micro-batches, then step."""
    k, n = config.batch.virtual_workers, config.batch.images_per_worker
    model = build_model(config, sources[0], ranks)
    optimizer = torch.optim.SGD(
        parameter_groups(model, config.optimizer.weight_decay), lr=0.01, momentum=0.9, nesterov=True
    )
    autocast = make_autocast(config.execution.precision, ranks.device)
    memory_format = torch.channels_last if config.execution.channels_last else torch.contiguous_format
    batches = sources[0].stream(_shuffled(sources[0].images, n), augment=True)

    def window() -> None:
        for _ in range(STEPS_PER_WINDOW):
            optimizer.zero_grad(set_to_none=True)
            for images, labels in itertools.islice(batches, k):
                with autocast():
                    loss = F.cross_entropy(model(images.contiguous(memory_format=memory_format)), labels)
                (loss / k).backward()
            optimizer.step()
        _wait(ranks)

    return window


def _shuffled(images: int, n: int) -> Iterator[Pass]:
    generator = np.random.default_rng(0)
    for epoch in itertools.count():
        order = generator.permutation(images)
        for start in range(0, images - n + 1, n):
            yield Pass(epoch, order[start : start + n])


def _wait(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def time_pairs(first: Window, second: Window, ranks: Ranks) -> list[tuple[float, float]]:
    """Seconds of each window, the two in turn and the order of each pair swapped."""
    first(), second()  # warm-up: allocations, DDP's first buckets
    pairs = []
    for pair in range(PAIRS):
        seconds = {}
        for window in (first, second) if pair % 2 == 0 else (second, first):
            ranks.barrier()
            start = time.perf_counter()
            window()
            seconds[window] = time.perf_counter() - start
        pairs.append((seconds[first], seconds[second]))
    return pairs


def main() -> None:
    noise = "--noise-scale" in sys.argv
    config = load_config(Path(sys.argv[1]), [argument for argument in sys.argv[3:] if "=" in argument], Config)
    with connect(device=config.execution.device, threads=config.execution.threads) as ranks:
        sources = load(config.data, seed=config.seed, device=ranks.device)
        reproducible = config.model_copy(
            update={"execution": config.execution.model_copy(update={"reduction": "reproducible"})}
        )
        fast = config.model_copy(update={"execution": config.execution.model_copy(update={"reduction": "fast"})})
        first = our_window(reproducible, ranks, sources, noise=noise)
        if noise:
            second, compared = our_window(reproducible, ranks, sources), "the same without the gradient noise scale"
        elif ranks.world_size == 1:
            second, compared = bare_window(config, ranks, sources), "a bare PyTorch loop"
        else:
            second, compared = our_window(fast, ranks, sources), "reduction fast"
        pairs = time_pairs(first, second, ranks)
    if ranks.is_main:
        report(config, ranks, pairs, compared)


def report(config: Config, ranks: Ranks, pairs: list[tuple[float, float]], compared: str) -> None:
    """Write the JSON and print the medians."""
    images = STEPS_PER_WINDOW * config.batch.global_batch
    ratios = [theirs / ours for ours, theirs in pairs]
    quartiles = statistics.quantiles(ratios, n=4)
    result = {
        "compared": f"train_step with reduction reproducible against {compared}",
        "world_size": ranks.world_size,
        "virtual_workers": config.batch.virtual_workers,
        "images_per_worker": config.batch.images_per_worker,
        "model": config.model.name,
        "precision": config.execution.precision,
        "ratio_of_images_per_second": {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "n": PAIRS},
        "images_per_second": [statistics.median(images / s[i] for s in pairs) for i in range(2)],
        "steps_per_window": STEPS_PER_WINDOW,
        "windows": pairs,
        "environment": describe_environment(),
    }
    write_json_atomically(Path(sys.argv[2]), result)
    print(f"ratio {quartiles[1]:.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}, n = {PAIRS}), {compared}")


if __name__ == "__main__":
    main()
