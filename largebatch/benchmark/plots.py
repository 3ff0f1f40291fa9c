"""The pictures of a benchmark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from largebatch.benchmark.breakdown import PARTS
from largebatch.benchmark.tables import ranks_text
from largebatch.report.files import write_bytes_atomically

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
Measurements = Sequence[Mapping[str, Any]]


def draw(result: Mapping[str, Any], run_dir: Path) -> list[Path]:
    """Draw every picture that `result` has the figures for; returns their paths."""
    found = result["measurements"]
    drawn = [
        _save(_throughput(found), run_dir / "throughput.png"),
        _save(_step_time(found), run_dir / "step_time.png"),
        _save(_breakdown(found), run_dir / "breakdown.png"),
    ]
    if result.get("prediction"):
        drawn.append(_save(_prediction(found, result["prediction"]), run_dir / "prediction.png"))
    return drawn


def _axes(columns: int = 1) -> tuple[Any, Any]:
    # Slow to import, and a Figure of its own leaves a user's pyplot and its backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * columns, 4.5), dpi=120, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes_atomically(path, picture.getvalue())
    return path


def _by_mode(measurements: Measurements) -> dict[str, list[Mapping[str, Any]]]:
    """The measurements of each mode, with one rank as it stands for the baseline: without DDP."""
    modes: dict[str, list[Mapping[str, Any]]] = {}
    for m in measurements:
        if m["world_size"] > 1 or not m["ddp"]:
            modes.setdefault(m["mode"], []).append(m)
    return modes


def _throughput(measurements: Measurements) -> Any:
    """Images a second over N, and the ideal: the paper's Figure 8."""
    modes = _by_mode(measurements)
    figure, panels = _axes(len(modes))
    for axes, (mode, found) in zip(panels, modes.items(), strict=True):
        counts = [m["world_size"] for m in found]
        per_rank = found[0]["images_per_second"] / counts[0]
        ideal = [per_rank * n for n in counts]
        axes.plot(counts, ideal, "--", color="grey", label=f"ideal, from {found[0]['baseline']}")
        axes.plot(counts, [m["images_per_second"] for m in found], "o-", color=_COLOURS[mode], label="measured")
        for m in found:
            axes.annotate(
                f"{100 * m['efficiency']:.0f} %",
                (m["world_size"], m["images_per_second"]),
                textcoords="offset points",
                xytext=(6, -12),
            )
        _count_axis(axes, counts)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.1)
        axes.set_ylabel("images per second")
        axes.set_title(f"{mode} scaling: {_kept(mode, found[0])}")
        axes.legend()
    return figure


def _kept(mode: str, m: Mapping[str, Any]) -> str:
    if mode == "strong":
        return f"minibatch {m['global_batch']}"
    return f"{m['global_batch'] // m['world_size']} images per rank"


def _step_time(measurements: Measurements) -> Any:
    """Time of a step over the minibatch: the paper's Figure 7."""
    figure, (axes,) = _axes()
    for mode, found in _by_mode(measurements).items():
        if mode == "strong" and "weak" in {m["mode"] for m in measurements}:
            continue  # one minibatch: a column of points
        batches = [m["global_batch"] for m in found]
        errors = [500 * m["spread"]["step"] for m in found]
        axes.errorbar(
            batches, [1000 * m["step"] for m in found], errors, fmt="o-", capsize=4, color=_COLOURS[mode], label=mode
        )
        for m in found:
            axes.annotate(
                f"N={m['world_size']}",
                (m["global_batch"], 1000 * m["step"]),
                textcoords="offset points",
                xytext=(6, 6),
            )
    axes.margins(x=0.1, y=0.15)
    axes.set_ylim(bottom=0)  # last: it ends the scaling that makes the margins
    axes.set_xlabel("minibatch (images)")
    axes.set_ylabel("time of a step (ms; bars: middle half of the rounds)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _breakdown(measurements: Measurements) -> Any:
    """Stacked parts of a step for each N; what noise made negative is drawn as nothing."""
    modes = list(dict.fromkeys(m["mode"] for m in measurements))
    figure, panels = _axes(len(modes))
    for axes, mode in zip(panels, modes, strict=True):
        found = [m for m in measurements if m["mode"] == mode]
        bottoms = [0.0] * len(found)
        places = range(len(found))
        for part in PARTS:
            heights = [max(0.0, 1000 * m[part]) for m in found]
            axes.bar(places, heights, 0.6, bottom=bottoms, color=_COLOURS[part], label=part.replace("_", " "))
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
        axes.hlines([1000 * m["step"] for m in found], [x - 0.35 for x in places], [x + 0.35 for x in places], "k")
        axes.set_xticks(list(places), [ranks_text(m) for m in found])
        axes.set_xlabel("ranks N")
        axes.set_ylabel("ms of a step")
        axes.set_ylim(top=1.35 * max(bottoms))
        axes.set_title(f"{mode} scaling: where the step goes (line: measured whole)")
        axes.legend(fontsize="small", ncols=2, loc="upper left")
    return figure


def _prediction(measurements: Measurements, prediction: Mapping[str, Any]) -> Any:
    """Efficiency over N: measured, and predicted for each algorithm, with the band of the leave-one-out error."""
    figure, (axes,) = _axes()
    measured = _by_mode(measurements)["weak"]
    counts, efficiencies = [m["world_size"] for m in measured], [100 * m["efficiency"] for m in measured]
    axes.plot(counts, efficiencies, "o-", color="black", label="measured", zorder=3)
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
    if prediction["error"] is None:
        axes.set_title("no error band: it takes two measured N above 1", fontsize="small")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _count_axis(axes: Any, counts: Sequence[int]) -> None:
    axes.set_xticks(list(counts), [str(n) for n in counts])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("ranks N")
    axes.grid(alpha=0.3)
