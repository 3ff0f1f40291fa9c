"""Measures cases in interleaved windows: every round has a window of each kind of each case."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from largebatch.benchmark.breakdown import Window, break_down
from largebatch.benchmark.cases import Case
from largebatch.benchmark.harness import KINDS, Bucket, Harness
from largebatch.benchmark.options import Options
from largebatch.config import Config
from largebatch.data.source import ImageSource
from largebatch.distributed.environment import Ranks
from largebatch.distributed.subgroups import Subgroups

_CLOSURE = 0.03  # how far the parts may be from the step before more rounds are run
_MORE = 2  # at most this many times the requested rounds


@dataclass
class Measured:
    """What was measured of one case; complete on rank 0."""

    case: Case
    global_batch: int
    windows: list[Window] = field(default_factory=list)
    compute_steps: list[list[float]] = field(default_factory=list)
    """Seconds of single steps of the "compute" windows, by rank: their jitter."""
    peak_memory: list[int] = field(default_factory=list)
    """Bytes, by rank."""
    buckets: list[Bucket] = field(default_factory=list)
    replay_seconds: float = 0.0
    """Seconds of the step in which `buckets` were noted."""


@dataclass
class _Running:
    """A case on one of its ranks."""

    harness: Harness
    measured: Measured
    steps: int


def measure(
    config: Config,
    cases: Sequence[Case],
    ranks: Ranks,
    groups: Subgroups,
    sources: tuple[ImageSource, ImageSource],
    options: Options,
    note: Callable[[str], None],
) -> dict[Case, Measured]:
    """Every case, on all ranks of the launch at once; complete on rank 0."""
    running: dict[Case, _Running] = {}
    for case in cases:
        members = groups.first(case.world_size, ddp=case.ddp)
        if members is not None:
            running[case] = _prepare(config, case, members, sources, options)
            note(f"ready: {case.name}, windows of {running[case].steps} steps")
        groups.sleep()
    done = 0
    while ranks.broadcast(_goes_on(running, done, options) if ranks.is_main else None):
        # Back and forth, so that no case always follows the same one.
        for case in cases if done % 2 == 0 else reversed(cases):
            if case in running:
                _run_round(running[case], done)
            groups.sleep()
        done += 1
        note(_status(running, done, options))
    return {case: found.measured for case, found in running.items()}


def _prepare(
    config: Config, case: Case, members: Ranks, sources: tuple[ImageSource, ImageSource], options: Options
) -> _Running:
    harness = Harness(case.config(config), members, sources)
    seconds = harness.warm_up()
    measured = Measured(case, harness.global_batch)
    measured.peak_memory = members.gather(harness.peak_memory)
    measured.compute_steps = [[] for _ in range(members.world_size)]
    if case.ddp:
        measured.buckets, measured.replay_seconds = harness.buckets()
    return _Running(harness, measured, steps=max(2, math.ceil(options.window_seconds / seconds)))


def _run_round(running: _Running, number: int) -> None:
    kinds = [kind for kind in KINDS if kind != "exchange" or running.measured.case.ddp]
    turn = number % len(kinds)
    for kind in kinds[turn:] + kinds[:turn]:
        ends = running.harness.window(kind, running.steps)
        by_rank = running.harness.ranks.gather(ends)
        seconds = tuple(found[-1] / running.steps for found in by_rank)
        running.measured.windows.append(Window(number, kind, running.steps, seconds))
        if kind == "compute":
            for steps, found in zip(running.measured.compute_steps, by_rank, strict=True):
                steps += [end - start for start, end in zip([0.0, *found], found, strict=False)]


def _goes_on(running: dict[Case, _Running], done: int, options: Options) -> bool:
    if done < options.rounds:
        return True
    if done >= _MORE * options.rounds:
        return False
    return any(abs(break_down(found.measured.windows).closure) > _CLOSURE for found in running.values())


def _status(running: dict[Case, _Running], done: int, options: Options) -> str:
    times = [
        f"{found.measured.case.name}: {1000 * found.measured.windows[-1].slowest:.1f} ms" for found in running.values()
    ]
    more = " (more, until the parts add up to the step)" if done > options.rounds else ""
    return f"round {done} of {options.rounds}{more}  " + "; ".join(times)
