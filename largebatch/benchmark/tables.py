"""Measurements as text: for the terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from largebatch.benchmark.breakdown import PARTS, clearly_above_zero, noise_in

_CSV = (
    "mode", "world_size", "ddp", "virtual_workers", "global_batch", "step", *PARTS, "closure", "images_per_second",
    "efficiency", "baseline", "slowest_rank",
)  # fmt: skip
Table = tuple[list[str], list[list[str]]]
"""Headings and rows of cells."""


def scaling_table(measurements: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each measurement: its speed, and its efficiency against every baseline by name."""
    baselines = sorted(
        dict.fromkeys(name for m in measurements for name in m["efficiencies"]),
        key=lambda name: name != measurements[0]["baseline"],
    )
    head = ["mode", "N", "kn", "step ms", "images/s", *(f"efficiency vs {name}" for name in baselines), "slowest rank"]
    rows = []
    for m in measurements:
        found = [m["efficiencies"].get(name) for name in baselines]
        rows.append(
            [
                m["mode"],
                _marked(m),
                str(m["global_batch"]),
                _milliseconds(m["step"], m["spread"]["step"]),
                f"{m['images_per_second']:,.0f}",
                *(_percent(e["value"], e["spread"]) if e else "" for e in found),
                _slowest(m),
            ]
        )
    return head, rows


def breakdown_table(measurements: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each measurement: where its step goes, and the peak memory of the fullest rank."""
    head = ["mode", "N", *(f"{part.replace('_', ' ')} ms" for part in PARTS), "sum / step", "peak memory MiB"]
    rows = [
        [
            m["mode"],
            _marked(m),
            *(_milliseconds(m[part], m["spread"][part]) for part in PARTS),
            f"{100 * (1 + m['closure']):.1f} %",
            f"{max(m['peak_memory_by_rank']) / 2**20:,.0f}",
        ]
        for m in measurements
    ]
    return head, rows


def allreduce_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """The all-reduce alone, in nccl-tests' terms."""
    head = ["N", "all-reduce", "bytes", "ms", "algbw GB/s", "busbw GB/s"]
    rows = [
        [
            str(a["world_size"]),
            a["reduction"],
            f"{a['size']:,}",
            _milliseconds(a["seconds"], a["spread"]),
            f"{a['algbw'] / 1e9:.3f}",
            f"{a['busbw'] / 1e9:.3f}",
        ]
        for a in found
    ]
    return head, rows


def prediction_table(prediction: Mapping[str, Any]) -> Table:
    """The predicted steps, our own all-reduce first."""
    predicted = prediction["predictions"]
    baselines = list(dict.fromkeys(name for p in predicted for name in p["efficiencies"]))
    head = ["N", "nodes", "all-reduce", "step ms", *(f"efficiency vs {name}" for name in baselines), "limit"]
    rows = [
        [
            str(p["world_size"]),
            str(p["nodes"]),
            p["algorithm"].replace("_", " "),
            f"{1000 * p['step']:.2f}",
            *(f"{100 * p['efficiencies'][name]:.1f} %" for name in baselines),
            p["limit"],
        ]
        for p in predicted
    ]
    return head, rows


def tune_table(tune: Mapping[str, Any]) -> Table:
    """What was tried, the fastest first."""
    head = ["setting", "gain in images/s", "faster beyond noise", "changes numbers"]
    tried = sorted(tune["tried"], key=lambda t: -t["gain"])
    rows = []
    for t in tried:
        # From the raw rounds, so that an older benchmark.json is judged by the same rule.
        pairs = zip(t["images_per_second"], t["images_per_second_as_configured"], strict=True)
        clear = clearly_above_zero([own / other - 1 for own, other in pairs])
        gain = f"{100 * t['gain']:+.1f} ± {50 * t['spread']:.1f} %"
        rows.append([t["name"], gain, "yes" if clear else "no", t["numerics"]])
    return head, rows


def tune_rule(tune: Mapping[str, Any]) -> str:
    """How it was decided what is faster."""
    return (
        f"of {len(tune['tried'])} settings some are ahead by chance: faster means a median gain above its whole "
        "interquartile range (twice the ±), and gains in nine of ten rounds, of five or more"
    )


def prediction_notes(prediction: Mapping[str, Any]) -> list[str]:
    """What the prediction rests on: how good the fit is, its parameters, and what is assumed."""
    errors = prediction["leave_one_out"]
    found = ", ".join(f"{name}: {100 * error:+.1f} %" for name, error in errors.items())
    parameters = ", ".join(f"{name} {value:.4g}" for name, value in prediction["parameters"].items())
    return [
        f"leave-one-out error of the step: {found}"
        if errors
        else "leave-one-out error: unknown; it needs at least two N above 1 (--ranks 1,2,3)",
        f"parameters (seconds, bytes; fitted unless listed as assumed): {parameters}",
        *(f"assumed: {assumption}" for assumption in prediction["assumptions"]),
        "two-level is omitted where it equals one of the others: on one node a ring, on nodes of up to 3 ranks halving "
        "and doubling",
    ]


def noise_notes(measurements: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is marked as noise, and why."""
    notes = [f"* {m['mode']}, N = {ranks_text(m)}: {'; '.join(noise_in(m))}" for m in measurements if noise_in(m)]
    advice = (
        "* marks impossible values, which are noise: conclude nothing from these rows. Repeat on a quiet machine, with "
        "more --rounds or longer --window-seconds"
    )
    return [*notes, advice] if notes else []


def _marked(measurement: Mapping[str, Any]) -> str:
    return ranks_text(measurement) + (" *" if noise_in(measurement) else "")


def ranks_text(measurement: Mapping[str, Any]) -> str:
    """``2``, or for one rank also whether it ran under DDP."""
    if measurement["world_size"] > 1:
        return str(measurement["world_size"])
    return "1 (DDP)" if measurement["ddp"] else "1 (no DDP)"


def machine_text(environment: Mapping[str, Any]) -> str:
    """``AMD EPYC, 2 cores (AVX2, no bf16), torch 2.15.0, Python 3.11.7``; older files do not know the instructions."""
    cpu, packages = environment["cpu"], environment["packages"]
    bf16 = {True: "bf16", False: "no bf16"}.get(cpu.get("bf16"))
    instructions = ", ".join(word for word in (cpu.get("capability"), bf16) if word)
    return (
        f"{cpu['model']}, {cpu['cores']} cores{f' ({instructions})' if instructions else ''}, torch "
        f"{packages['torch']}, Python {environment['python']}"
    )


def as_text(table: Table) -> str:
    """Aligned columns."""
    lines = [table[0], *table[1]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def as_markdown(table: Table) -> str:
    """A Markdown table."""
    lines = [table[0], ["---"] * len(table[0]), *table[1]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(measurements: Sequence[Mapping[str, Any]]) -> str:
    """The derived figures, in seconds, one line for each measurement."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(measurements)
    return text.getvalue()


def _slowest(measurement: Mapping[str, Any]) -> str:
    """``3 (+4 %)``: by how much its own compute is above the median rank's."""
    by_rank = sorted(measurement["compute_by_rank"])
    if len(by_rank) == 1:
        return ""
    median = by_rank[(len(by_rank) - 1) // 2]
    return f"{measurement['slowest_rank']} (+{100 * (by_rank[-1] / median - 1):.0f} %)"


def _milliseconds(seconds: float, spread: float) -> str:
    return f"{1000 * seconds:.2f} ± {500 * spread:.2f}"


def _percent(value: float, spread: float) -> str:
    return f"{100 * value:.1f} ± {50 * spread:.1f} %"
