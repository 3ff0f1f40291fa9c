"""Runs the runs of experiments on this machine, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from largebatch.distributed.environment import Launch
from largebatch.errors import Preempted
from largebatch.reproduce.folders import LOG, Folders, Standing
from largebatch.reproduce.grid import Run
from largebatch.reproduce.worker import work
from largebatch.training.preemption import StopRequest, stop_on_signals

_TICK_SECONDS = 0.5
_PATIENCE_SECONDS = 60.0  # for a last checkpoint


class Watcher(Protocol):
    """Receives the progress of the runs."""

    def started(self, run: Run, ranks: int) -> None:
        """A run was started or resumed on `ranks` ranks."""

    def ended(self, run: Run, standing: Standing) -> None:
        """A run came to an end, good or bad."""

    def tick(self) -> None:
        """Half a second has passed."""


@dataclass
class _Job:
    """A run that is being trained."""

    run: Run
    processes: list[BaseProcess]
    meeting: tempfile.TemporaryDirectory[str]
    slot: int
    status: int = 0
    """The first exit status that is not 0."""
    alive: set[int] = field(default_factory=set)
    """Ranks that have not ended."""


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spare_ranks(run: Run, jobs: int, cores: int) -> int:
    """Ranks for a run when `jobs` share `cores`: as many as have cores for their threads, at most its passes.

    The result does not depend on it, so the cores are divided as they are there.
    """
    if run.ranks is not None:
        return run.ranks
    execution = run.config.execution
    if execution.reduction != "reproducible":
        return 1
    passes = run.config.batch.virtual_workers // execution.workers_per_pass
    return max(1, min(passes, cores // (jobs * execution.threads)))


class LocalRunner:
    """Trains runs in processes of this machine, `jobs` at a time."""

    def __init__(self, folders: Folders, *, jobs: int, gpus: int) -> None:
        """With `gpus` each job has one to itself, in turn; without, the jobs divide the cores."""
        self._folders = folders
        self._jobs = jobs
        self._gpus = gpus
        # Its server imports torch once; a run is then a fork of it, within milliseconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["largebatch.reproduce.worker", "largebatch.run", "torch.utils.tensorboard"]
        )

    def execute(self, runs: Iterable[Run], watcher: Watcher) -> None:
        """Train all `runs` to their ends; a run that fails is reported to `watcher`, and the others continue.

        Raises Preempted when asked by a signal to stop: the runs have then written checkpoints.
        """
        waiting = list(runs)
        running: list[_Job] = []
        with stop_on_signals() as request:
            try:
                while waiting or running:
                    while len(running) < self._jobs and not request.asked and (run := _next(waiting, running)):
                        waiting.remove(run)
                        running.append(self._start(run, running, watcher))
                    self._wait(running, watcher)
                    if request.asked:
                        break
            except KeyboardInterrupt:
                self._stop(running)
                raise Preempted(_STOPPED) from None
            except BaseException:
                self._stop(running)
                raise
            self._leave(request, running)

    def _leave(self, request: StopRequest, running: list[_Job]) -> None:
        if request.asked:
            self._stop(running)
            raise Preempted(_STOPPED)

    def _start(self, run: Run, running: list[_Job], watcher: Watcher) -> _Job:
        slot = min(set(range(self._jobs)) - {job.slot for job in running})
        ranks = (run.ranks or 1) if self._gpus else spare_ranks(run, self._jobs, usable_cores())
        gpu = slot % self._gpus if self._gpus and ranks == 1 else None
        folder = self._folders.begin(run)
        config_file = self._folders.write_config(run)
        meeting = tempfile.TemporaryDirectory()
        processes: list[BaseProcess] = []
        for rank in range(ranks):
            launch = Launch(rank, ranks, rank, ranks, "environment", f"file://{meeting.name}/store")
            arguments = (config_file, folder, run.row, launch if ranks > 1 else Launch(), folder / LOG, gpu)
            process = self._context.Process(target=work, args=arguments)
            process.start()
            processes.append(process)
        watcher.started(run, ranks)
        return _Job(run, processes, meeting, slot, alive=set(range(ranks)))

    def _wait(self, running: list[_Job], watcher: Watcher) -> None:
        """Wait a little, or until a process ends; take the runs out of `running` that have ended."""
        wait([job.processes[rank].sentinel for job in running for rank in job.alive], timeout=_TICK_SECONDS)
        for job in list(running):
            for rank in [rank for rank in job.alive if job.processes[rank].exitcode is not None]:
                job.alive.discard(rank)
                job.status = job.status or job.processes[rank].exitcode or 0
            if not job.alive:
                running.remove(job)
                job.meeting.cleanup()
                watcher.ended(job.run, self._folders.end(job.run, job.status))
        watcher.tick()

    def _stop(self, running: list[_Job]) -> None:
        """Ask all runs to stop, and wait for their last checkpoints."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        processes = [process for job in running for process in job.processes]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
        for job in running:
            job.meeting.cleanup()


def _next(waiting: Sequence[Run], running: Sequence[_Job]) -> Run | None:
    """The first run that starts from none of the others."""
    unfinished = {run.key for run in waiting} | {job.run.key for job in running}
    return next((run for run in waiting if run.start is None or run.start.key not in unfinished), None)


_STOPPED = "stopped; all runs have kept their checkpoints, and the same command resumes them"


def log_of(folders: Folders, run: Run) -> Path:
    """Where a run's own words are."""
    return folders.of(run) / LOG
