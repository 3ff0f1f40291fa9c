"""What the tests of whole runs share: the command line on N ranks, and what it leaves in a run folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import RanksFailed, run_ranks

from largebatch.cli import main
from largebatch.distributed.environment import Launch

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs/digits.yaml")
# kn = 8 x 4 = 32 of 270 images: 8 steps an epoch, 14 images dropped. Records after steps 3, 6, 8, 9, 12, 15, 16;
# evaluations after 8 and 16, of 101 images in 5 batches; checkpoints after 3, 6, 8, 9, 12, 15, 16.
SMALL = [
    "data.train_images=270",
    "data.val_images=101",
    "batch={virtual_workers: 8, images_per_worker: 4}",
    "schedule={reference_batch: 16, epochs: 2, warmup: {kind: gradual, epochs: 0.5}, decay: {epochs: [1.5]}}",
    "evaluation.images_per_batch=25",
    "logging.every_steps=3",
    "checkpoint.every_steps=3",
]
TIMING = ("time", "images_per_second", "data_wait", "compute", "slowest_rank", "slowdown")


class Outcome(NamedTuple):
    """What one rank's command came to."""

    status: int
    out: str
    err: str


def call(*arguments: str | Path) -> Outcome:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Outcome(status, out.getvalue(), err.getvalue())


def _as_rank(_: Launch, arguments: list[str]) -> Outcome:
    return call(*arguments)


def call_on(world_size: int, *arguments: str | Path) -> list[Outcome]:
    """The command line on so many ranks, each a process of its own."""
    return run_ranks(_as_rank, world_size, [str(argument) for argument in arguments])


def train_digits(run_dir: Path, world_size: int, *arguments: str) -> list[Outcome]:
    """Two short epochs of configs/digits.yaml, to their end."""
    outcomes = call_on(world_size, "train", DIGITS, "--run-dir", run_dir, *SMALL, *arguments)
    for rank, outcome in enumerate(outcomes):
        assert outcome.status == 0, f"rank {rank}: {outcome.err}"
    return outcomes


def _train_and_die(_: Launch, run_dir: Path, step: int, arguments: list[str]) -> None:
    def wait() -> None:
        while max(saved_steps(run_dir), default=0) < step:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
    main(arguments)


def train_digits_until_killed(run_dir: Path, world_size: int, step: int, *arguments: str) -> None:
    """The same, but every rank dies of SIGKILL when a checkpoint of `step` or later is whole."""
    command = ["train", DIGITS, "--run-dir", str(run_dir), *SMALL, *arguments]
    with pytest.raises(RanksFailed):
        run_ranks(_train_and_die, world_size, run_dir, step, command)
    assert not (run_dir / "summary.json").exists(), "the run came to its end before it was killed"


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the run's whole checkpoints."""
    return sorted(int(path.stem[5:]) for path in (run_dir / "checkpoints").glob("step_*.json"))


def tensor_hashes(run_dir: Path, name: str = "model.pt") -> dict[str, str]:
    """SHA-256 of every tensor in a file of weights."""
    weights = torch.load(run_dir / name, weights_only=True)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in weights.items()}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock said."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def summary(run_dir: Path) -> dict[str, Any]:
    """summary.json."""
    return json.loads((run_dir / "summary.json").read_text())


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's (step, value) by tag, read with its own reader, without what a clock said."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in TIMING]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
