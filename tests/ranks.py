"""Runs a test's function as N ranks: real processes, a rendezvous without a port, a hard timeout, and every
rank's traceback."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from largebatch.distributed.environment import RENDEZVOUS, Launch

# The server imports torch once; a rank is then a fork of it, within milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "largebatch.run"])


class RanksFailed(AssertionError):
    """At least one rank raised, died, or did not come to its end in time."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """``function(launch, *args)`` on `world_size` ranks; their results, in rank order.

    `function` must be importable (top level of a test module), arguments and results picklable.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_run,
                args=(sender, function, rank, world_size, f"file://{folder}/store", args),
                daemon=True,
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    outcomes: dict[int, tuple[str, Any]] = {}
    while len(outcomes) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in outcomes]
        ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                outcomes[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                outcomes[rank] = ("error", "the process died")
        if any(kind == "error" for kind, _ in outcomes.values()):
            deadline = min(deadline, time.monotonic() + 3.0)  # the others may have something to say, or hang
        if not ready:
            break
    if len(outcomes) < len(pipes) or any(kind == "error" for kind, _ in outcomes.values()):
        raise RanksFailed("\n".join(_story(rank, outcomes.get(rank)) for rank in range(len(pipes))))
    return [outcomes[rank][1] for rank in range(len(pipes))]


def _story(rank: int, outcome: tuple[str, Any] | None) -> str:
    if outcome is None:
        return f"--- rank {rank}: still running at the deadline"
    return f"--- rank {rank}: " + (outcome[1] if outcome[0] == "error" else "finished")


def _run(
    sender: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ[RENDEZVOUS] = store
    launch = Launch(rank, world_size, rank, world_size, "environment", store)
    try:
        sender.send(("result", function(launch, *args)))
    except BaseException:
        sender.send(("error", traceback.format_exc()))
        sys.exit(1)
