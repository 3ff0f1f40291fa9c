"""Who hangs? Each rank says in the rendezvous store where it is; those that wait too long name the one they wait for.

A backend cannot say it: gloo knows only that time is up, and NCCL's watchdog ends the process without a message.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

from largebatch.errors import RanksLost

EXCHANGE = "exchange"
"""The phase of a rank that waits for others; all other phases are its own work."""
VERDICT = "verdict"
"""Key in the store of the one message that all ranks leave with."""
_LONGEST_INTERVAL = 2.0  # seconds; hundreds of ranks then ask the store for some hundred things a second
RESTART = "Run the same command again: it resumes from the newest checkpoint"


def failed_key(rank: int) -> str:
    """Where a rank leaves its own error, or "" if it has only seen that others are gone."""
    return f"failed/{rank}"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int
    """Grows as long as the process runs."""
    step: int
    phase: str
    still: float
    """Seconds without progress: since the phase was entered."""
    host: str

    @property
    def place(self) -> str:
        where = (
            f"in step {self.step}, phase {self.phase}" if self.step >= 0 else f"before the first step ({self.phase})"
        )
        return f"{where}, on {self.host}"


class Whereabouts:
    """The step and phase that this rank is in. Entering a phase, the same one too, is progress."""

    def __init__(self) -> None:
        self._now = (-1, "start", time.monotonic())  # replaced as a whole: another thread reads it
        self._resumed = 0.0
        self.leaving = threading.Lock()
        """Held by the one thread that says why this rank leaves."""

    def enter(self, phase: str, step: int | None = None) -> None:
        self._now = (self._now[0] if step is None else step, phase, time.monotonic())

    @contextlib.contextmanager
    def waiting(self, phase: str = EXCHANGE) -> Iterator[None]:
        """Inside, this rank is in `phase`."""
        before = self._now[1]
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def resumed(self) -> None:
        """The whole process was stopped until now (a suspended job): that time is nobody's."""
        self._resumed = time.monotonic()

    def beat(self, number: int) -> Beat:
        step, phase, since = self._now
        return Beat(number, step, phase, time.monotonic() - max(since, self._resumed), socket.gethostname())


def judge(beats: Sequence[Beat], unchanged: Sequence[float], *, timeout: float, interval: float) -> list[int]:
    """The ranks that the others wait for, to be asked once a rank has waited for `timeout` seconds.

    `unchanged` is for how many seconds each rank's beat has been the same one. A rank that is slow but makes progress
    is none of them; nor is one at work while nobody waits, however long its evaluation or compilation takes. All
    ranks, if each waits for the others: then it is the network that hangs.
    """
    silent = [rank for rank, seconds in enumerate(unchanged) if seconds >= timeout / 2]
    # What a rank says is as old as its newest beat.
    still = [rank for rank, beat in enumerate(beats) if beat.still >= timeout - 2 * interval and rank not in silent]
    behind = [rank for rank in still if beats[rank].phase != EXCHANGE]
    if silent or behind:
        return sorted(silent + behind)
    return still if len(still) == len(beats) else []


def accuse(ranks: Sequence[int], beats: Sequence[Beat], unchanged: Sequence[float], timeout: float) -> str:
    """The message that names `ranks`, which `judge` found."""
    within = f"no progress for {timeout / 60:.3g} minutes (execution.timeout_minutes)"
    waiting = [beat for rank, beat in enumerate(beats) if rank not in ranks]
    if not waiting:
        places = {f"step {beat.step}, phase {beat.phase}" for beat in beats}
        return f"all ranks wait for each other, {within}: {'; '.join(sorted(places))}. Check the network. {RESTART}"
    found = [
        f"rank {rank} died or hung, last heard of {unchanged[rank]:.0f} s ago {beats[rank].place}"
        if unchanged[rank] >= timeout / 2
        else f"rank {rank} hangs {beats[rank].place}"
        for rank in ranks
    ]
    step = max(beat.step for beat in waiting)
    return f"{'; '.join(found)}; the others wait in step {step}: {within}. {RESTART}"


class Heartbeat:
    """Two threads of a rank: one that talks to the store, and one that watches, since a store may never answer."""

    def __init__(
        self, whereabouts: Whereabouts, store: dist.Store, *, rank: int, world_size: int, timeout: float
    ) -> None:
        """`store` is used by this object alone: a thread that waits in one keeps the others from using it."""
        self._whereabouts = whereabouts
        self._store = store
        self._rank = rank
        self._keys = [f"beat/{other}" for other in range(world_size)]
        self._timeout = timeout
        self._interval = min(timeout / 20, _LONGEST_INTERVAL)
        self._ended = threading.Event()
        self._number = 0
        self._seen: list[tuple[int, float]] = []
        """The number of each rank's newest beat, and when it was first seen."""
        self._answered = time.monotonic()
        self._verdict: str | None = None
        self._publish()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, this process ends with RanksLost, whatever it does, once a rank is found to hang."""
        main = threading.current_thread()
        threading.Thread(target=self._talk, name="heartbeat", daemon=True).start()
        threading.Thread(target=self._watch, args=(main,), name="watch", daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()

    def _sleep(self, seconds: float) -> bool:
        """False at the end."""
        before = time.monotonic()
        if self._ended.wait(seconds):
            return False
        if time.monotonic() - before > seconds + self._timeout / 4:
            self._whereabouts.resumed()
            self._seen, self._answered = [], time.monotonic()
        return True

    def _publish(self) -> Beat:
        self._number += 1
        beat = self._whereabouts.beat(self._number)
        self._store.set(self._keys[self._rank], json.dumps(asdict(beat)))
        return beat

    def _talk(self) -> None:
        with contextlib.suppress(RuntimeError):  # the rank that holds the store has left
            while self._sleep(self._interval) and self._verdict is None:
                beat = self._publish()
                if self._store.check([VERDICT]):
                    verdict = self._store.get(VERDICT).decode()
                else:
                    verdict = self._ask(beat) if beat.still > 2 * self._interval else ""
                self._answered = time.monotonic()
                if verdict:
                    self._store.set(failed_key(self._rank), "")
                    self._store.add("heard", 1)
                    self._verdict = verdict

    def _ask(self, own: Beat) -> str:
        """What the store says of the others; a verdict, which all ranks share, or ""."""
        if not self._store.check(self._keys):
            return ""
        beats = [Beat(**json.loads(text)) for text in self._store.multi_get(self._keys)]
        now = time.monotonic()
        before = self._seen or [(-1, now)] * len(beats)
        newest = [(beat.number, now) for beat in beats]
        self._seen = [old if old[0] == new[0] else new for old, new in zip(before, newest, strict=True)]
        if own.phase != EXCHANGE or own.still < self._timeout:
            return ""
        unchanged = [now - since for _, since in self._seen]
        found = judge(beats, unchanged, timeout=self._timeout, interval=self._interval)
        if not found:
            return ""
        causes = [rank for rank in found if self._store.check([failed_key(rank)])]
        text = accuse(found, beats, unchanged, self._timeout)
        quoted = "".join(f"; rank {rank}: {self._store.get(failed_key(rank)).decode()}" for rank in causes)
        return self._store.compare_set(VERDICT, "", text + quoted).decode()

    def _watch(self, main: threading.Thread) -> None:
        while self._sleep(self._interval / 2):
            verdict, now = self._verdict, time.monotonic()
            beat = self._whereabouts.beat(0)
            waits = beat.phase == EXCHANGE and beat.still >= self._timeout
            if verdict is None and waits and now - self._answered >= self._timeout / 2:
                verdict = (
                    "rank 0 died or hung, or the process that holds the rendezvous: it has not answered for "
                    f"{now - self._answered:.0f} s. {RESTART}"
                )
            if verdict is not None and self._whereabouts.leaving.acquire(blocking=False):
                self._leave(verdict if beat.phase == EXCHANGE else f"{verdict}. This rank is {_stack(main)}")

    def _leave(self, verdict: str) -> None:
        """End the process, since the main thread may wait for ever; the hook of the program says why."""
        try:
            raise RanksLost(verdict)
        except RanksLost:
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        # The store may be in this process: the others read the verdict there.
        deadline = time.monotonic() + 2 * self._interval
        with contextlib.suppress(RuntimeError):
            while (
                self._rank == 0
                and self._verdict is not None
                and time.monotonic() < deadline
                and self._store.add("heard", 0) < len(self._keys)
            ):
                time.sleep(self._interval / 10)
        os._exit(RanksLost.exit_status)


def _stack(thread: threading.Thread) -> str:
    """Where a thread is, innermost first."""
    frames = traceback.extract_stack(sys._current_frames().get(thread.ident or 0))
    return "at " + " < ".join(f"{frame.filename}:{frame.lineno} ({frame.name})" for frame in frames[:-6:-1])
