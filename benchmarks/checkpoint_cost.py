"""What checkpoints cost: paired windows of training steps, one with a checkpoint begun in it and one without.

python benchmarks/checkpoint_cost.py [CONFIG] [OUT.json]   (benchmark/resnet20_cpu,
                                                            results/survive/checkpoint_cost.json; about a minute)

A checkpoint's cost is the median of the pairs' differences; at one a minute, its share of the time is that over 60 s.
A window lasts until what it began to write is on the disk, so nothing that the writing takes is missed.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from largebatch.config import Config
from largebatch.configfile.loading import load_config
from largebatch.data.load import load
from largebatch.data.source import Pass
from largebatch.distributed.environment import connect
from largebatch.plan import make_plan
from largebatch.report.environment import describe_environment
from largebatch.report.files import write_json_atomically
from largebatch.run import make_trainer
from largebatch.training.checkpoint import CheckpointFolder, serialise
from largebatch.training.saver import BackgroundSaver
from largebatch.training.step import TimedBatches, train_step
from largebatch.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
PAIRS = 60
WINDOW_SECONDS = 0.4


def passes(trainer: Trainer) -> Iterator[Pass]:
    """Endless."""
    for step in itertools.count():
        for workers in trainer.virtual.workers_by_pass:
            yield Pass(trainer.order.epoch_of(step), trainer.order.indices(step, workers))


class Windows:
    """Steps in windows, as `Trainer.run` runs them."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._trainer = trainer
        self._saver = BackgroundSaver(CheckpointFolder(folder, keep=2))
        self._batches = TimedBatches(trainer.train.stream(passes(trainer), augment=True), trainer.memory_format)
        self._steps = itertools.count()
        trainer.virtual.model.train()

    def seconds(self, steps: int, *, saves: bool) -> float:
        """Of `steps` steps; with `saves`, a checkpoint is begun before the first."""
        start = time.perf_counter()
        if saves:
            self._trainer.step += 1
            self._saver.save(self._trainer.state())
        for _ in range(steps):
            train_step(
                self._trainer.virtual,
                self._trainer.optimizer,
                self._batches,
                step=next(self._steps),
                lr=0.01,
                autocast=self._trainer.autocast,
                loss_scale=self._trainer.loss_scale,
            )
        self._saver.wait()
        assert self._saver.error is None
        return time.perf_counter() - start


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmark/resnet20_cpu")
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "results/survive/checkpoint_cost.json"
    config = load_config(path, [], Config)
    with connect(device=config.execution.device, threads=config.execution.threads) as ranks:
        sources = load(config.data, seed=config.seed, device=ranks.device)
        plan = make_plan(
            config, name="", world_size=ranks.world_size, train_images=sources[0].images, val_images=sources[1].images
        )
        with tempfile.TemporaryDirectory() as name:
            trainer = make_trainer(config, plan, ranks, sources, CheckpointFolder(Path(name), keep=2))
            windows = Windows(trainer, Path(name))
            windows.seconds(3, saves=True)
            steps = max(2, round(WINDOW_SECONDS / (windows.seconds(5, saves=False) / 5)))
            pairs = []
            for pair in range(PAIRS):
                turns = (True, False) if pair % 2 == 0 else (False, True)
                found = {saves: windows.seconds(steps, saves=saves) for saves in turns}
                pairs.append((found[True], found[False]))
                print(f"pair {pair}: {1000 * (found[True] - found[False]):+.1f} ms", flush=True)
            size = len(serialise(trainer.state()))
    report(out, config, pairs, steps, size)


def report(out: Path, config: Config, pairs: list[tuple[float, float]], steps: int, size: int) -> None:
    """Write the JSON and print the cost."""
    costs = [with_it - without for with_it, without in pairs]
    quartiles = statistics.quantiles(costs, n=4)
    share = quartiles[1] / 60
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(
        out,
        {
            "model": config.model.name,
            "checkpoint_bytes": size,
            "seconds_of_a_checkpoint": {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "n": PAIRS},
            "share_of_time_at_one_a_minute": share,
            "share_at_the_upper_quartile": quartiles[2] / 60,
            "steps_per_window": steps,
            "windows_with_and_without": pairs,
            "environment": describe_environment(),
        },
    )
    print(
        f"a checkpoint of {size / 1e6:.1f} MB costs {1000 * quartiles[1]:.1f} ms: {100 * share:.3f} % at one a minute"
    )


if __name__ == "__main__":
    main()
