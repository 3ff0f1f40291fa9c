from __future__ import annotations

import io
import re

import pytest

from largebatch.report.progress import LineProgress, open_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_hold_the_figures() -> None:
    stream = io.StringIO()
    now = iter([0.0, 5.0])
    lines = LineProgress(stream, total_steps=200, steps_done=90, clock=lambda: next(now))
    lines.update(
        {
            "step": 100,
            "epoch": 1.5,
            "train/loss": 0.51234,
            "train/top1_error": 25.0,
            "lr": 0.1,
            "images_per_second": 12345.6,
        }
    )
    assert stream.getvalue() == (
        "step 100/200  epoch 1.50  loss 0.5123  top-1 error 25.00 %  lr 0.1  12,346 images/s"
        "  time left 0:00:50\n"  # 10 steps took 5 s, 100 are left
    )


def test_lines_come_at_the_start_each_ten_seconds_on_evaluation_and_at_the_end() -> None:
    stream = io.StringIO()
    now = [0.0]
    lines = LineProgress(stream, total_steps=60, steps_done=0, clock=lambda: now[0])
    for step in range(1, 61):
        now[0] = float(step)
        lines.update({"step": step, "epoch": step / 10} | ({"val/top1_error": 9.0} if step == 37 else {}))
    shown = [int(re.match(r"step (\d+)/60", line)[1]) for line in stream.getvalue().splitlines()]  # type: ignore[index]
    assert shown == [1, 11, 21, 31, 37, 47, 57, 60]


def test_no_terminal_gives_plain_lines_without_control_characters() -> None:
    stream = io.StringIO()
    with open_progress(is_main=True, total_steps=2, steps_done=0, stream=stream) as progress:
        progress.note("data: 60,000 images [/red]")
        progress.update({"step": 2, "epoch": 1.0, "train/loss": 1.0})
    assert stream.getvalue() == "data: 60,000 images [/red]\nstep 2/2  epoch 1.00  loss 1.0000\n"


def test_a_terminal_gets_a_bar_and_lines_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    with open_progress(is_main=True, total_steps=100, steps_done=40, stream=stream) as progress:
        progress.note("resumed [40]")
        progress.update({"step": 50, "epoch": 0.5, "train/loss": 0.25, "images_per_second": 1000.0})
        progress.update({"step": 60, "epoch": 0.6, "val/top1_error": 8.75})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "resumed [40]" in text
    assert "epoch 0.60  val top-1 error 8.75 %" in text
    assert "60/100" in text
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_off_the_main_rank_nothing_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    with open_progress(is_main=False, total_steps=2, steps_done=0, stream=stream) as progress:
        progress.note("text")
        progress.update({"step": 1, "epoch": 0.5})
    assert stream.getvalue() == ""
    assert capfd.readouterr() == ("", "")
