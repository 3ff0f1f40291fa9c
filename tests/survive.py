"""Ranks as processes that a test may kill, stop and signal, one by one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from run_folders import DIGITS, SMALL, Outcome, saved_steps

from largebatch.cli import main
from largebatch.distributed.environment import RENDEZVOUS
from largebatch.training.trainer import Trainer

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torchvision", "largebatch.run", "torch.utils.tensorboard", "matplotlib.pyplot", "ranks", "survive"]
)
# kn and steps as in SMALL; evaluations are rare, and the ranks talk to each other within half a minute or never.
QUICK = [*SMALL, "evaluation.every_epochs=2", "execution.timeout_minutes=0.5"]


class Fleet:
    """`largebatch` on `world_size` ranks; kills what is left of them at the end of the ``with``."""

    def __init__(
        self,
        world_size: int,
        *arguments: str | Path,
        prepare: Callable[..., None] | None = None,
        prepare_args: Sequence[Any] = (),
        environ: Callable[[int], dict[str, str]] = lambda _: {},
    ) -> None:
        """`prepare(rank, *prepare_args)` runs in each rank first; `environ(rank)` changes its variables."""
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.processes = []
        self.variables = []
        for rank in range(world_size):
            for kind in ("out", "err"):
                (self.folder / f"rank{rank}.{kind}").touch()
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world_size),
                RENDEZVOUS: f"file://{self.folder}/store",
                **environ(rank),
            }
            self.variables.append(variables)
            process = _CONTEXT.Process(
                target=_run,
                args=(rank, str(self.folder / f"rank{rank}"), variables, [str(a) for a in arguments]),
                kwargs={"prepare": prepare, "prepare_args": tuple(prepare_args)},
                daemon=False,
            )
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """A signal to these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            assert pid is not None
            if self.processes[rank].is_alive():
                os.kill(pid, number)

    def output(self, rank: int) -> str:
        """What this rank has printed so far."""
        return "".join((self.folder / f"rank{rank}.{kind}").read_text() for kind in ("out", "err"))

    def until(self, reached: Callable[[], bool], timeout: float = 60.0) -> None:
        """Wait for something that the ranks do."""
        deadline = time.monotonic() + timeout
        while not reached():
            assert time.monotonic() < deadline, "it did not come to that\n" + self.story()
            assert any(process.is_alive() for process in self.processes), "all have ended\n" + self.story()
            time.sleep(0.001)

    def outcomes(self, timeout: float = 60.0, ranks: Sequence[int] | None = None) -> list[Outcome]:
        """How these ranks (or all) ended: status (minus the signal's number if killed), out and err."""
        awaited = list(range(len(self.processes)) if ranks is None else ranks)
        deadline = time.monotonic() + timeout
        for rank in awaited:
            wait([self.processes[rank].sentinel], timeout=max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank in awaited if self.processes[rank].is_alive()]
        assert not hanging, f"ranks {hanging} still run after {timeout} s\n" + self.story()
        found = []
        for rank in awaited:
            self.processes[rank].join()
            out, err = ((self.folder / f"rank{rank}.{kind}").read_text() for kind in ("out", "err"))
            found.append(Outcome(self.processes[rank].exitcode or 0, out, err))
        return found

    def story(self) -> str:
        """What all ranks printed, for a test that failed."""
        return "\n".join(f"--- rank {r}:\n{self.output(r)}" for r in range(len(self.processes)))


def _run(
    rank: int,
    log: str,
    variables: dict[str, str],
    arguments: list[str],
    *,
    prepare: Callable[..., None] | None,
    prepare_args: tuple[Any, ...],
) -> None:
    for kind, descriptor in (("out", 1), ("err", 2)):
        file = os.open(f"{log}.{kind}", os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
    os.environ.update(variables)
    if prepare is not None:
        prepare(rank, *prepare_args)
    sys.exit(main(arguments))


def slow_steps(_: int) -> None:
    """To prepare a rank: its steps are long enough to be hit in the middle, and the run to be hit before its end."""
    train_step = Trainer._train_step

    def slowly(self: Trainer, *inputs: Any) -> Any:
        time.sleep(0.15)
        return train_step(self, *inputs)

    Trainer._train_step = slowly  # type: ignore[method-assign]


def training(run_dir: Path, *arguments: str) -> list[str]:
    """The command that trains two short epochs in `run_dir`."""
    return ["train", DIGITS, "--run-dir", str(run_dir), *QUICK, *arguments]


def run_to_the_end(world_size: int, run_dir: Path, *arguments: str) -> list[Outcome]:
    """The same command, with nobody in its way."""
    with Fleet(world_size, *training(run_dir, *arguments)) as fleet:
        outcomes = fleet.outcomes()
        assert [outcome.status for outcome in outcomes] == [0] * world_size, fleet.story()
        return outcomes


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max(saved_steps(run_dir), default=0)
