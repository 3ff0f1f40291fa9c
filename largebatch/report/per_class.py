"""Accuracy by class and the confusion matrix, as tables and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from largebatch.errors import UserError
from largebatch.report.figure import Warn, draw, explain, panels, plain
from largebatch.report.files import write_text_atomically

PER_CLASS_FILES = ("per_class.csv", "confusion.csv", "confusion.png")
_NAMED = 40  # classes whose names fit beside a figure


def write_per_class(folder: Path, names: Sequence[str], confusion: np.ndarray, warn: Warn) -> None:
    """Write both tables and the figure of `confusion`, int64 [true class, predicted class].

    Raises UserError if they cannot be written.
    """
    table, matrix, picture = (folder / name for name in PER_CLASS_FILES)
    right = confusion.diagonal()
    wrong = confusion - np.diag(right)
    rows: list[list[Any]] = [["class", "images", "right", "accuracy", "most_often_taken_for", "times"]]
    for name, images, hits, row in zip(names, confusion.sum(axis=1).tolist(), right.tolist(), wrong, strict=True):
        accuracy = f"{100 * hits / images:.4f}" if images else ""
        rows.append([name, images, hits, accuracy, names[row.argmax()] if row.any() else "", int(row.max())])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(table, rows)
        _write_csv(matrix, [["true", *names], *([n, *row] for n, row in zip(names, confusion.tolist(), strict=True))])
    except OSError as error:
        where = f"{error.filename or folder}: {error.strerror}"
        raise UserError(f"--out: {where}; give a folder that can be written") from None
    draw(picture, lambda: _figure(names, confusion), warn)


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text_atomically(path, text.getvalue())


def _figure(names: Sequence[str], confusion: np.ndarray) -> Any:
    size = 3 + 0.25 * min(len(names), _NAMED)
    figure, (axes,) = panels(size=(size, size))
    axes.grid(False)
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shown = axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="images of the true class (%)", shrink=0.7)
    if len(names) <= _NAMED:
        ticks = range(len(names))
        axes.set_xticks(ticks, [plain(name) for name in names], rotation=90)
        axes.set_yticks(ticks, [plain(name) for name in names])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    accuracy = 100 * confusion.diagonal().sum() / max(confusion.sum(), 1)
    explain(figure, f"{confusion.sum()} labels, {accuracy:.2f} % right", "each row is one class's images")
    return figure
