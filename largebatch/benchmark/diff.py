"""Two benchmarks side by side: how much faster one is, and what else differs between them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from largebatch.benchmark.breakdown import noise_in
from largebatch.benchmark.tables import Table, as_text, ranks_text
from largebatch.errors import UserError

_OF_EVERY_START = ("started", "command", "variables.TORCHELASTIC_RUN_ID", "variables.SLURM_JOB_ID")
Result = Mapping[str, Any]


def compare(first: Path, second: Path) -> str:
    """What `benchmark diff` prints. Raises UserError where one of them holds no benchmark."""
    a, b = _read(first), _read(second)
    differences = [*_differences(a, b, "config"), *_differences(a, b, "environment")]
    said = ["What differs:", *(f"  {line}" for line in differences)] if differences else ["Nothing else differs."]
    return "\n".join([f"A: {first}", f"B: {second}", "", as_text(ratio_table(a, b)), "", *said])


def ratio_table(a: Result, b: Result) -> Table:
    """A row for each measurement that both have: its step in each, and the ratio of images a second.

    The two were not measured in turns, so a drift of the machine is in the ratio; its ± is from both interquartile
    ranges, and no ratio within it, or of noise, says anything.
    """
    others = {_place(m): m for m in b["measurements"]}
    rows = []
    for m in a["measurements"]:
        other = others.pop(_place(m), None)
        rows.append([m["mode"], ranks_text(m), str(m["global_batch"]), *_cells(m, other)])
    rows += [[m["mode"], ranks_text(m), str(m["global_batch"]), "", _step(m), "", "only in B"] for m in others.values()]
    return ["mode", "N", "kn", "A: step ms", "B: step ms", "images/s, B / A", "B is"], rows


def _cells(m: Result, other: Result | None) -> list[str]:
    if other is None:
        return [_step(m), "", "", "only in A"]
    ratio = other["images_per_second"] / m["images_per_second"]
    spread = ratio * math.hypot(*(0.5 * found["spread"]["step"] / found["step"] for found in (m, other)))
    verdict = "faster" if ratio > 1 + spread else "slower" if ratio < 1 - spread else "no clear difference"
    if noise_in(m) or noise_in(other):
        verdict = "noise"
    return [_step(m), _step(other), f"{ratio:.3f} ± {spread:.3f}", verdict]


def _place(m: Result) -> tuple[Any, ...]:
    return m["mode"], m["world_size"], m["ddp"], m["global_batch"]


def _step(m: Result) -> str:
    return f"{1000 * m['step']:.2f} ± {500 * m['spread']['step']:.2f}"


def _differences(a: Result, b: Result, part: str) -> Iterator[str]:
    first, second = dict(_flat(a[part])), dict(_flat(b[part]))
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key) and not key.startswith(_OF_EVERY_START):
            yield f"{part}.{key}: {first.get(key, 'not there')} | {second.get(key, 'not there')}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, found in value.items():
        if isinstance(found, Mapping) and found:
            yield from _flat(found, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", found


def _read(path: Path) -> Result:
    file = path / "benchmark.json" if path.is_dir() else path
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        for m in result["measurements"]:
            _step(m), _place(m), noise_in(m), m["images_per_second"]
        result["config"].items(), result["environment"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"benchmark diff: {file} is not the JSON of a benchmark ({type(error).__name__}: {error}); give folders "
            "that `largebatch benchmark` wrote"
        ) from None
    return result
