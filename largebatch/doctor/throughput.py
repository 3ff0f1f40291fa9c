"""How fast one rank's loader delivers images, and how fast its model consumes them."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from largebatch.config import Config
from largebatch.data.settings import IN_MEMORY
from largebatch.data.source import ImageSource, Pass
from largebatch.distributed.environment import Ranks
from largebatch.doctor.finding import Finding, judged
from largebatch.run import build_model
from largebatch.training.precision import make_autocast

_SECONDS = 0.5
_AMPLE = 1.2  # images come in bursts, so that a loader which is just fast enough is waited for at times


def images_per_pass(config: Config) -> int:
    """Images that go through the model together on one rank."""
    return config.batch.images_per_worker * config.execution.workers_per_pass


def reads_files(config: Config) -> bool:
    """Whether loader processes decode image files; sets in memory have none."""
    return config.data.name not in IN_MEMORY


def measure_loader(config: Config, source: ImageSource) -> float:
    """Images per second of one rank's loader, when what it had prepared is used up."""
    count = images_per_pass(config)
    passes = (Pass(0, (np.arange(count) + first) % source.images) for first in itertools.count(0, count))
    prepared = config.data.loader_processes * config.data.prefetch if reads_files(config) else 1
    with contextlib.closing(source.stream(passes, augment=True)) as stream:
        for _ in itertools.islice(stream, 1 + prepared):
            pass
        return count * _rate(stream)


def measure_model(config: Config, source: ImageSource, ranks: Ranks) -> float:
    """Images per second of one rank's forward and backward, without exchange and update."""
    model = build_model(config, source, ranks).train()
    images = torch.randn(images_per_pass(config), *source.shape, device=ranks.device)
    if config.execution.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(len(images), dtype=torch.int64, device=ranks.device)
    autocast = make_autocast(config.execution.precision, ranks.device)

    def steps() -> Iterator[None]:
        while True:
            with autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            model.zero_grad()
            yield

    endless = steps()
    for _ in range(2):
        next(endless)
    return len(images) * _rate(endless, ranks.device)


def _rate(stream: Iterator[object], device: torch.device | None = None) -> float:
    """Items per second, over half a second and at least one item. Waits for the device, if one is given."""
    _wait(device)
    start, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - start < _SECONDS:
        next(stream)
        _wait(device)
        done += 1
    return done / (time.perf_counter() - start)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def check_loader(loader: float, model: float, *, from_files: bool) -> Finding:
    """The loader's images per second against the model's."""
    ratio = loader / model
    seen = f"{loader:,.0f} images/s per rank, the model takes {model:,.0f}: {ratio:,.1f} times what it needs"
    if ratio >= _AMPLE:
        return Finding("loader", "ok", seen)
    waits = f"the model would wait for images {max(0.0, 1 - ratio):.0%} of the time" if ratio < 1 else "little to spare"
    cure = "raise data.loader_processes (if there are cores), lower data.image_size" if from_files else "free the cores"
    return judged("loader", seen, f"{waits}: {cure}")
