from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from largebatch.report.files import write_json_atomically, write_text_atomically


def test_text_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text_atomically(path, "old and much longer\n")
    write_text_atomically(path, "ηk\n")
    assert path.read_bytes() == "ηk\n".encode()
    assert os.listdir(tmp_path) == ["note.txt"]


def test_a_reader_with_the_old_file_open_keeps_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")
    with path.open() as reader:
        write_text_atomically(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_json_has_sorted_keys_and_a_closing_newline(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomically(path, {"b": [1, None], "a": {"d": 0.5, "c": "é"}})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"a": {"c": "é", "d": 0.5}, "b": [1, None]}
    assert text.endswith("}\n")
    assert text.index('"a"') < text.index('"b"')
    assert text.index('"c"') < text.index('"d"')


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_what_json_cannot_hold_leaves_the_old_file_alone(tmp_path: Path, value: object) -> None:
    path = tmp_path / "summary.json"
    write_json_atomically(path, 1)
    with pytest.raises((TypeError, ValueError)):
        write_json_atomically(path, value)
    assert path.read_text() == "1\n"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_failed_rename_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - which one is the system's choice
        write_text_atomically(tmp_path / "folder", "text")
    assert os.listdir(tmp_path) == ["folder"]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text_atomically(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
