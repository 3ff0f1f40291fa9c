"""What is measured: a config's step on N ranks, in weak and strong scaling. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from largebatch.benchmark.options import Options
from largebatch.config import Config
from largebatch.errors import ConfigError
from largebatch.plan import make_order
from largebatch.recipe.batch import deal_equally

WITHOUT_DDP = "1 rank without DDP"
WITH_DDP = "1 rank with DDP"


@dataclass(frozen=True)
class Case:
    """One step to be measured; two modes may share it."""

    world_size: int
    virtual_workers: int
    ddp: bool

    @property
    def name(self) -> str:
        ddp = "" if self.world_size > 1 else ", DDP" if self.ddp else ", no DDP"
        return f"N={self.world_size}{ddp}, k={self.virtual_workers}"

    def config(self, config: Config) -> Config:
        """`config` with this case's minibatch, and without the gradient noise scale: it is not measured here, and
        takes two passes, which a case may not have."""
        logging = config.logging.model_copy(update={"noise_scale_every_steps": 0})
        return config.model_copy(update={"logging": logging}).with_workers(self.virtual_workers)


@dataclass(frozen=True)
class Row:
    """A case in the mode in which it is reported."""

    mode: str
    case: Case


def make_rows(config: Config, options: Options) -> list[Row]:
    """Every case of every mode, smallest N first. Raises ConfigError for a k that does not fit an N."""
    modes = ("weak", "strong") if options.mode == "both" else (options.mode,)
    rows = [Row(mode, case) for mode in modes for size in options.ranks for case in _cases(config, options, mode, size)]
    for row in rows:
        deal_equally(row.case.virtual_workers, config.execution.workers_per_pass, row.case.world_size)
    return rows


def check_images(config: Config, rows: list[Row], train_images: int) -> None:
    """Raise ConfigError if some minibatch is larger than the set."""
    for row in rows:
        make_order(row.case.config(config), train_images)


def _cases(config: Config, options: Options, mode: str, size: int) -> Iterator[Case]:
    workers = config.batch.virtual_workers if mode == "strong" else size * workers_per_rank(config, options)
    if size == 1:
        yield Case(1, workers, ddp=False)
    yield Case(size, workers, ddp=True)


def workers_per_rank(config: Config, options: Options) -> int:
    """Virtual workers of each rank in weak scaling. Raises ConfigError if k does not divide by the largest N."""
    if options.workers_per_rank is not None:
        return options.workers_per_rank
    k, largest = config.batch.virtual_workers, options.ranks[-1]
    if k % largest:
        raise ConfigError(
            f"batch.virtual_workers: {k} do not divide by {largest} ranks, and weak scaling gives each rank as many; "
            f"set batch.virtual_workers={-(-k // largest) * largest}, or say how many with --workers-per-rank"
        )
    return k // largest
