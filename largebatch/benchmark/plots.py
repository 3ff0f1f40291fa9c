"""The plots of a benchmark."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from largebatch.benchmark.breakdown import PARTS, noise_in
from largebatch.benchmark.tables import ranks_text
from largebatch.report.figure import Warn, draw, explain, panels

PLOTS = ("throughput.png", "step_time.png", "breakdown.png", "prediction.png")
_COLOURS = {
    "compute": "#4c78a8",
    "exposed_communication": "#e45756",
    "data_wait": "#f2b134",
    "other": "#9d9d9d",
    "weak": "#4c78a8",
    "strong": "#54a24b",
}
# Told apart without colour too.
_ALGORITHMS = {
    "ring": ("#e45756", "^"),
    "halving_doubling": ("#4c78a8", "v"),
    "two_level": ("#54a24b", "D"),
}
_BARS = "error bars: ± half the interquartile range of the rounds"
_SIZE = (6.5, 4.5)  # inches of a panel
Result = Mapping[str, Any]
Measurements = Sequence[Mapping[str, Any]]


def draw_plots(result: Result, run_dir: Path, warn: Warn) -> list[str]:
    """Draw every plot that `result` has the figures for; returns the names of the files."""
    makers = dict(zip(PLOTS, (_throughput, _step_time, _breakdown, _prediction), strict=True))
    if not result.get("prediction"):
        del makers["prediction.png"]
    return [name for name, make in makers.items() if draw(run_dir / name, functools.partial(make, result), warn)]


def _title(result: Result) -> str:
    config, environment = result["config"], result["environment"]
    gpus = (environment.get("cuda") or {}).get("devices") or []
    machine = f"{len(gpus)} × {gpus[0]['name']}" if gpus else environment["cpu"]["model"]
    return (
        f"{config['model']['name']} on {config['data']['name']}, n = {config['batch']['images_per_worker']}, "
        f"{config['execution']['precision']}, reduction {config['execution']['reduction']}; {machine}"
    )


def _by_mode(measurements: Measurements) -> dict[str, list[Mapping[str, Any]]]:
    """The measurements of each mode, with one rank as it stands for the baseline: without DDP."""
    modes: dict[str, list[Mapping[str, Any]]] = {}
    for m in measurements:
        if m["world_size"] > 1 or not m["ddp"]:
            modes.setdefault(m["mode"], []).append(m)
    return modes


def _throughput(result: Result) -> Any:
    """Images a second over N, and the ideal: the paper's Figure 8."""
    modes = _by_mode(result["measurements"])
    figure, axes_of = panels(columns=len(modes), size=_SIZE)
    for axes, (mode, found) in zip(axes_of, modes.items(), strict=True):
        counts = [m["world_size"] for m in found]
        per_rank = found[0]["images_per_second"] / counts[0]
        ideal = [per_rank * n for n in counts]
        axes.plot(counts, ideal, "--", color="grey", label=f"ideal, from {found[0]['baseline']}")
        speeds = [m["images_per_second"] for m in found]
        bars = [0.5 * m["images_per_second"] * m["spread"]["step"] / m["step"] for m in found]
        axes.errorbar(counts, speeds, bars, fmt="o-", capsize=4, color=_COLOURS[mode], label="measured")
        for m in found:
            noisy = " (noise)" if noise_in(m) else ""
            axes.annotate(
                f"{100 * m['efficiency']:.0f} %{noisy}",
                (m["world_size"], m["images_per_second"]),
                textcoords="offset points",
                xytext=(6, -12),
            )
        _count_axis(axes, counts)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.15)
        axes.set_ylabel("images per second")
        axes.set_title(f"{mode} scaling: {_kept(mode, found[0])}", fontsize="medium")
        axes.legend()
    explain(figure, _title(result), f"{_BARS}; percent: efficiency, the median over the rounds")
    return figure


def _kept(mode: str, m: Mapping[str, Any]) -> str:
    if mode == "strong":
        return f"minibatch {m['global_batch']}"
    return f"{m['global_batch'] // m['world_size']} images per rank"


def _step_time(result: Result) -> Any:
    """Time of a step over the minibatch: the paper's Figure 7."""
    figure, (axes,) = panels(size=_SIZE)
    modes = _by_mode(result["measurements"])
    for mode, found in modes.items():
        if mode == "strong" and "weak" in modes:
            continue  # one minibatch: a column of points
        batches = [m["global_batch"] for m in found]
        errors = [500 * m["spread"]["step"] for m in found]
        steps = [1000 * m["step"] for m in found]
        axes.errorbar(batches, steps, errors, fmt="o-", capsize=4, color=_COLOURS[mode], label=f"{mode} scaling")
        for m in found:
            place = (m["global_batch"], 1000 * m["step"])
            axes.annotate(f"N={m['world_size']}", place, textcoords="offset points", xytext=(6, 6))
    axes.margins(x=0.1, y=0.15)
    axes.set_ylim(bottom=0)  # last: it ends the scaling that makes the margins
    axes.set_xlabel("minibatch (images)")
    axes.set_ylabel("time of a step (ms)")
    axes.legend()
    explain(figure, _title(result), _BARS)
    return figure


def _breakdown(result: Result) -> Any:
    """Stacked parts of a step for each N; what noise made negative hangs below zero."""
    measurements = result["measurements"]
    modes = list(dict.fromkeys(m["mode"] for m in measurements))
    figure, axes_of = panels(columns=len(modes), size=_SIZE)
    for axes, mode in zip(axes_of, modes, strict=True):
        found = [m for m in measurements if m["mode"] == mode]
        tops, bottoms = [0.0] * len(found), [0.0] * len(found)
        places = range(len(found))
        for part in PARTS:
            heights = [1000 * m[part] for m in found]
            starts = [top if height > 0 else low for top, low, height in zip(tops, bottoms, heights, strict=True)]
            axes.bar(places, heights, 0.6, bottom=starts, color=_COLOURS[part], label=part.replace("_", " "))
            tops = [top + max(0.0, height) for top, height in zip(tops, heights, strict=True)]
            bottoms = [low + min(0.0, height) for low, height in zip(bottoms, heights, strict=True)]
        steps = [1000 * m["step"] for m in found]
        edges = [x - 0.35 for x in places], [x + 0.35 for x in places]
        axes.hlines(steps, *edges, color="k", label="the whole step")
        axes.errorbar(places, steps, [500 * m["spread"]["step"] for m in found], fmt="none", ecolor="k", capsize=4)
        axes.axhline(0, color="k", linewidth=0.8)
        axes.set_xticks(list(places), [ranks_text(m) + ("\nnoise" if noise_in(m) else "") for m in found])
        axes.set_xlabel("ranks N")
        axes.set_ylabel("ms of a step")
        axes.set_ylim(top=1.4 * max(*tops, *steps))
        axes.set_title(f"{mode} scaling", fontsize="medium")
        axes.legend(fontsize="small", ncols=2, loc="upper left")
    caption = f"parts: medians of differences of windows, below zero where noise is larger than the part\n{_BARS}"
    explain(figure, _title(result), caption)
    return figure


def _prediction(result: Result) -> Any:
    """Efficiency over N: measured, and predicted for each algorithm, with the band of the leave-one-out error."""
    prediction = result["prediction"]
    figure, (axes,) = panels(size=_SIZE)
    measured = _by_mode(result["measurements"])["weak"]
    counts, efficiencies = [m["world_size"] for m in measured], [100 * m["efficiency"] for m in measured]
    bars = [50 * m["efficiencies"][m["baseline"]]["spread"] for m in measured]
    axes.errorbar(counts, efficiencies, bars, fmt="o-", capsize=4, color="black", label="measured", zorder=3)
    own = prediction["algorithm"]
    predictions = [p for p in prediction["predictions"] if p["world_size"] > counts[-1]]
    for algorithm in dict.fromkeys(p["algorithm"] for p in predictions):
        found = [p for p in predictions if p["algorithm"] == algorithm]
        if algorithm == "two_level":  # a ring, as long as there is one node
            found = [p for p in predictions if p["algorithm"] == "ring" and p["nodes"] == 1] + found
        # Every line starts at the last measured point.
        xs = [counts[-1], *(p["world_size"] for p in found)]
        ys = [efficiencies[-1], *(100 * p["efficiency"] for p in found)]
        colour, marker = _ALGORITHMS[algorithm]
        name = algorithm.replace("_", "/" if algorithm == "halving_doubling" else "-")
        label = f"predicted, {name}" + (" (as measured)" if algorithm == own else "")
        style = "-" if algorithm == own else "--"
        axes.plot(xs, ys, style, color=colour, marker=marker, markevery=slice(1, None), markersize=5, label=label)
        if algorithm == own and prediction["error"] is not None:
            low, high = ([ys[0], *(y / (1 + e) for y in ys[1:])] for e in (prediction["error"], -prediction["error"]))
            axes.fill_between(xs, low, high, color=colour, alpha=0.2, label="± largest leave-one-out error")
    axes.set_xscale("log", base=2)
    _count_axis(axes, sorted({*counts, *(p["world_size"] for p in predictions)}))
    axes.set_ylim(0, 1.1 * max(efficiencies))
    axes.set_ylabel(f"weak scaling efficiency (%)\nvs {measured[0]['baseline']}")
    axes.legend(fontsize="small")
    unknown = "; no error band: it needs two measured N above 1" if prediction["error"] is None else ""
    explain(figure, _title(result), _BARS + unknown)
    return figure


def _count_axis(axes: Any, counts: Sequence[int]) -> None:
    axes.set_xticks(list(counts), [str(n) for n in counts])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("ranks N")
