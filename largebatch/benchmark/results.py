"""The measurements as `benchmark.json` holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from largebatch.benchmark.breakdown import Efficiency, break_down, efficiency, noise_in, windows_as_json
from largebatch.benchmark.cases import WITH_DDP, WITHOUT_DDP, Case, Row
from largebatch.benchmark.measure import Measured


def measurements(rows: Sequence[Row], measured: Mapping[Case, Measured], ranks_per_node: int) -> list[dict[str, Any]]:
    """One plain dict for each row; times in seconds of a step, memory in bytes, all by rank where it says so."""
    return [_measurement(row, rows, measured, ranks_per_node) for row in rows]


def _measurement(
    row: Row, rows: Sequence[Row], measured: Mapping[Case, Measured], ranks_per_node: int
) -> dict[str, Any]:
    case, found = row.case, measured[row.case]
    parts = break_down(found.windows)
    efficiencies = list(_efficiencies(row, rows, measured, ranks_per_node))
    measurement = {
        "mode": row.mode,
        "world_size": case.world_size,
        "ddp": case.ddp,
        "virtual_workers": case.virtual_workers,
        "workers_per_rank": case.virtual_workers / case.world_size,
        "global_batch": found.global_batch,
        "step": parts.step,
        **parts.parts,
        "spread": parts.spread,
        "closure": parts.closure,
        "images_per_second": found.global_batch / parts.step,
        "efficiency": efficiencies[0].value,
        "baseline": efficiencies[0].baseline,
        "efficiencies": {e.baseline: {"value": e.value, "spread": e.spread} for e in efficiencies},
        "slowest_rank": parts.slowest_rank,
        "compute_by_rank": parts.compute_by_rank,
        "compute_steps_by_rank": found.compute_steps,
        "peak_memory_by_rank": found.peak_memory,
        "buckets": [asdict(bucket) for bucket in found.buckets],
        "replay_seconds": found.replay_seconds,
        "windows": windows_as_json(found.windows),
    }
    return {**measurement, "noise": noise_in(measurement)}


def _efficiencies(
    row: Row, rows: Sequence[Row], measured: Mapping[Case, Measured], ranks_per_node: int
) -> Iterator[Efficiency]:
    """Against every baseline that was measured in this mode, the headline first."""
    own = measured[row.case]
    for name, case in _baselines([r.case for r in rows if r.mode == row.mode], ranks_per_node).items():
        base = measured[case]
        yield efficiency(
            name,
            own.windows,
            own.global_batch / row.case.world_size,
            base.windows,
            base.global_batch / case.world_size,
        )


def _baselines(cases: Sequence[Case], ranks_per_node: int) -> dict[str, Case]:
    """One rank without DDP and with it; one whole node, as in the paper; else the fewest ranks measured."""
    found: dict[str, Case] = {}
    for case in cases:
        if case.world_size == 1:
            found[WITH_DDP if case.ddp else WITHOUT_DDP] = case
        elif case.world_size == ranks_per_node:
            found[f"1 node of {ranks_per_node} ranks"] = case
    return found or {f"{cases[0].world_size} ranks": cases[0]}
