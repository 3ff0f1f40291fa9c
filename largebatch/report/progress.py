"""What rank 0 shows while it trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0
# How each metric is shown, in this order.
_SHOWN: dict[str, str] = {
    "epoch": "epoch {:.2f}",
    "train/loss": "loss {:.4f}",
    "train/top1_error": "top-1 error {:.2f} %",
    "val/loss": "val loss {:.4f}",
    "val/top1_error": "val top-1 error {:.2f} %",
    "val/top5_error": "val top-5 error {:.2f} %",
    "lr": "lr {:.4g}",
    "images_per_second": "{:,.0f} images/s",
}


class Progress:
    """The display of a run. This one shows nothing: it is what every rank but the main one has."""

    def update(self, record: dict[str, Any]) -> None:
        """Show a metric record (see `largebatch.report.metrics`)."""

    def note(self, text: str) -> None:
        """Show a line of text that stays."""

    def close(self) -> None:
        """End the display; the terminal is as it was."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_progress(*, is_main: bool, total_steps: int, steps_done: int, stream: TextIO | None = None) -> Progress:
    """The display of a run of ``total_steps`` updates, of which ``steps_done`` were done before.

    A bar if ``stream`` (standard output unless given) is a terminal, else plain lines; nothing off the main
    rank.
    """
    if not is_main:
        return Progress()
    console = Console(file=stream or sys.stdout)
    if console.is_terminal and not console.is_dumb_terminal:
        return BarProgress(console, total_steps, steps_done)
    return LineProgress(stream or sys.stdout, total_steps, steps_done)


class BarProgress(Progress):
    """A bar with the time left over the latest figures; evaluations and notes stay as lines above both."""

    def __init__(self, console: Console, total_steps: int, steps_done: int) -> None:
        self._bar = _BarOverFigures(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=300,  # seconds: records may be far apart
        )
        self._task = self._bar.add_task("", total=total_steps, completed=steps_done)
        self._bar.start()

    def update(self, record: dict[str, Any]) -> None:
        self._bar.figures = "  ".join(_figures(record))
        self._bar.update(self._task, completed=record["step"])
        if _is_evaluation(record):
            self.note(self._bar.figures)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class _BarOverFigures(RichProgress):
    """Two lines, because bar and figures do not fit into one of 80 columns."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.figures)


class LineProgress(Progress):
    """A line for the first and the last record, for every evaluation, and otherwise each ten seconds."""

    def __init__(
        self,
        stream: TextIO,
        total_steps: int,
        steps_done: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._steps_done = steps_done
        self._clock = clock
        self._started = clock()
        self._last_line: float | None = None

    def update(self, record: dict[str, Any]) -> None:
        now = self._clock()
        step = int(record["step"])
        is_due = self._last_line is None or now - self._last_line >= _SECONDS_BETWEEN_LINES
        if not (is_due or _is_evaluation(record) or step >= self._total_steps):
            return
        self._last_line = now
        self.note("  ".join([f"step {step}/{self._total_steps}", *_figures(record), *self._time_left(step, now)]))

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _time_left(self, step: int, now: float) -> list[str]:
        """The time left at the mean pace so far, evaluation included; nothing before the first step."""
        if step <= self._steps_done or step >= self._total_steps:
            return []
        pace = (now - self._started) / (step - self._steps_done)
        return [f"time left {timedelta(seconds=round(pace * (self._total_steps - step)))}"]


def _figures(record: dict[str, Any]) -> list[str]:
    return [form.format(record[key]) for key, form in _SHOWN.items() if key in record]


def _is_evaluation(record: dict[str, Any]) -> bool:
    return any(key.startswith("val/") for key in record)
