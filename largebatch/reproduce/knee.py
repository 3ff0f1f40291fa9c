"""Where the error rises over the minibatch, and what the gradient noise scale predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from largebatch.errors import DataError
from largebatch.report.noise import read_noise_scale
from largebatch.reproduce.statistics import SIGNIFICANT


def noise_scale_of(run_dirs: Sequence[Path]) -> float | None:
    """The gradient noise scale (images) of a row's finished runs together; None if they did not measure it."""
    scales = []
    for run_dir in run_dirs:
        try:
            scales.append(read_noise_scale(run_dir)[0])
        except DataError:
            continue
    squared_norm = math.fsum(scale.squared_norm for scale in scales)
    return math.fsum(scale.noise for scale in scales) / squared_norm if squared_norm > 0 else None


def find_knee(rows: Sequence[Mapping[str, Any]], reference: str, predicted: float | None) -> dict[str, Any]:
    """Between which two minibatches the error leaves the reference's, and its ratio to the noise scale.

    It has left from the smallest minibatch on from which every row's error is higher, with p < 0.05.
    """
    first = next(row for row in rows if row["name"] == reference)
    start = first["global_batch"]
    if first.get("at_chance"):
        words = "Cannot tell where the error rises: the reference is at chance level."
        return {"measured": None, "predicted": predicted, "ratio": None, "words": words}
    known = [row for row in rows if row["global_batch"] >= start and any(_has_ended(run) for run in row["runs"])]
    larger = sorted(known, key=lambda row: row["global_batch"])
    measured = None
    for below, row in zip(reversed(larger[:-1]), reversed(larger[1:]), strict=True):
        if not _is_worse(row):
            break
        measured = [below["global_batch"], row["global_batch"]]
    middle = math.sqrt(measured[0] * measured[1]) if measured else None
    ratio = middle / predicted if middle and predicted else None
    return {"measured": measured, "predicted": predicted, "ratio": ratio, "words": _words(measured, predicted, ratio)}


def _has_ended(run: Mapping[str, Any]) -> bool:
    return run["state"] in ("finished", "diverged")


def _is_worse(row: Mapping[str, Any]) -> bool:
    """Whether the row's error is clearly higher than the reference's; a row that only diverged is."""
    found = row["comparison"]
    if found is None:
        return bool(row["runs"]) and all(run["state"] == "diverged" for run in row["runs"])
    return found["p"] < SIGNIFICANT and found["difference"] > 0


def _words(measured: Sequence[int] | None, predicted: float | None, ratio: float | None) -> str:
    seen = (
        f"The error leaves the reference's between kn = {measured[0]} and {measured[1]}."
        if measured
        else "The error of the largest minibatch is not clearly above the reference's."
    )
    if predicted is None:
        return f"{seen} The gradient noise scale is not known."
    foretold = f"The gradient noise scale, averaged over the reference's runs, is {predicted:.0f} images"
    compared = f": the error rises at {ratio:.2g} times that (middle of the interval, by ratio)" if ratio else ""
    return f"{seen} {foretold}{compared}."
