"""A rank that hangs is named by the others, with its step and phase; a rank that only takes long is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hangs import hang, take_long

from largebatch.distributed.heartbeat import Beat, accuse, judge

TIMEOUT = 10.0  # a busy machine may stop any rank for some seconds
T, INTERVAL = 100.0, 5.0


@pytest.mark.parametrize(
    ("kind", "victim", "by", "words"),
    [
        ("forward", 1, "port", r"rank 1 hangs in step \d+, phase forward, on "),
        ("loader", 0, "file", r"rank 0 hangs in step \d+, phase loader, on "),
        ("stopped", 1, "port", r"rank 1 died or hung, last heard of \d+ s ago in step \d+, phase forward, on "),
        ("exchange", 0, "file", r"rank 0 died or hung, last heard of \d+ s ago in step \d+, phase exchange, on "),
    ],
)
def test_a_rank_that_hangs_is_named(tmp_path: Path, kind: str, victim: int, by: str, words: str) -> None:
    seen = hang(kind, tmp_path, world_size=3, victim=victim, by=by, timeout=TIMEOUT)
    assert seen.statuses == seen.left == [1, 1]
    for message in seen.messages:
        assert re.search(words, message), message
        assert message.count("\n") == 1
        assert "Run the same command again" in message
    if kind == "forward":  # the rank itself says where it is
        assert "hangs.py" in seen.victim
        assert "(go_through) < " in seen.victim


def test_whoever_takes_long_while_nobody_waits_is_not_taken_for_hanging(tmp_path: Path) -> None:
    """As in a first step that compiles for longer than the timeout, on all ranks."""
    assert take_long(tmp_path, world_size=2, timeout=TIMEOUT) == [0, 0]


def beat(phase: str, still: float, step: int = 7) -> Beat:
    return Beat(1, step, phase, still, "node1")


@pytest.mark.parametrize(
    ("beats", "unchanged", "found"),
    [
        ([beat("exchange", 100), beat("forward", 100)], [0, 4], [1]),
        ([beat("exchange", 100), beat("exchange", 100), beat("loader", 95)], [0, 0, 0], [2]),
        ([beat("exchange", 100), beat("exchange", 30)], [0, 60], [1]),  # silent, in the middle of its wait
        ([beat("exchange", 100), beat("evaluation", 20)], [0, 0], []),  # a batch every 20 s is progress
        ([beat("exchange", 100), beat("exchange", 40), beat("forward", 40)], [0, 0, 0], []),
        ([beat("exchange", 100), beat("exchange", 101)], [0, 0], [0, 1]),
    ],
)
def test_who_is_waited_for(beats: list[Beat], unchanged: list[float], found: list[int]) -> None:
    assert judge(beats, unchanged, timeout=T, interval=INTERVAL) == found


def test_where_each_waits_for_the_others_it_is_the_network() -> None:
    text = accuse([0, 1], [beat("exchange", 100), beat("exchange", 100, step=8)], [0, 0], T)
    assert text.startswith("all ranks wait for each other, no progress for 1.67 minutes")
    assert "step 7, phase exchange; step 8, phase exchange" in text
