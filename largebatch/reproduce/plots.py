"""The pictures of a report, made of its JSON."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from largebatch.report.files import write_bytes_atomically

_LABELS = {
    "train/top1_error": "training top-1 error (%)",
    "train/loss": "training loss (nats per image)",
    "top1_error": "validation top-1 error (%)",
    "train_loss": "training loss at the end (nats per image)",
    "global_batch": "minibatch kn (images)",
    "peak_lr": "learning rate",
}
_LOG_FROM = 4.0
_ENTRIES_INSIDE = 6  # a longer legend would hide what is drawn
_STDS = 2.0  # Figure 1 has bars of two standard deviations
Result = Mapping[str, Any]


def draw(result: Result, folder: Path) -> list[str]:
    """Draw every picture of `result` into `folder`; returns the file names."""
    names = []
    for plot in result["plots"]:
        figure, axes = _axes()
        rows = [row for row in result["rows"] if not plot["rows"] or row["name"] in plot["rows"]]
        if plot["kind"] == "curves":
            _draw_curves(axes, rows, result)
        else:
            _draw_sweep(axes, rows, plot["x"], result)
        axes.grid(alpha=0.3)
        axes.set_title(f"{result['settings']['title']}, scale {result['scale']}")
        entries = len(axes.get_legend_handles_labels()[0])
        if entries > _ENTRIES_INSIDE:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        elif entries:
            axes.legend(fontsize=8)
        name = f"{result['experiment']}_{plot['name']}.png"
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        write_bytes_atomically(folder / name, picture.getvalue())
        names.append(name)
    return names


def _axes() -> tuple[Any, Any]:
    # Slow to import, and a Figure of its own leaves a user's pyplot and its backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=110, layout="constrained")
    return figure, figure.subplots()


def _draw_curves(axes: Any, rows: Sequence[Result], result: Result) -> None:
    """Mean curves, with a band of one standard deviation on each side."""
    every = result["curve"]["every_steps"]
    for row in rows:
        points = [((i + 1) * (every or 1), point) for i, point in enumerate(row["curve"]) if point]
        if not points:
            continue
        x = [place for place, _ in points]
        mean = [point["mean"] for _, point in points]
        std = [point["std"] or 0.0 for _, point in points]
        (line,) = axes.plot(x, mean, label=f"{row['name']} (kn = {row['global_batch']})", linewidth=1.2)
        low, high = zip(*((m - s, m + s) for m, s in zip(mean, std, strict=True)), strict=True)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("step" if every else "epoch")
    axes.set_ylabel(_LABELS[result["curve"]["metric"]])


def _draw_sweep(axes: Any, rows: Sequence[Result], x: str, result: Result) -> None:
    """What was measured with bars of two standard deviations, and beside it what the paper has for the same rows."""
    lines: dict[str, list[Result]] = {}
    for row in rows:
        lines.setdefault(row["line"], []).append(row)
    shown = [row["result"]["mean"] for row in rows if row["result"]]
    if shown and max(shown) > _LOG_FROM * min(shown) > 0:
        axes.set_yscale("log")  # or the errors of trainings that failed would flatten all others
        _plain_numbers(axes.yaxis)
    alone = len(lines) == 1
    for name, members in lines.items():
        joined = alone or bool(name)  # a row of no line stands by itself
        label = name or ("here" if alone else "others")
        color = _draw_bars(axes, _points(members, x, "result"), label=label, linestyle="-" if joined else "none")
        paper = {"color": color, "alpha": 0.55, "linestyle": ":"} if name else {"color": "#9d9d9d", "linestyle": ":"}
        _draw_bars(axes, _points(members, x, "paper"), label=f"{name or 'the same rows'}, in the paper", **paper)
    _mark_diverged(axes, rows, x)
    if result.get("knee") and x == "global_batch":
        _draw_knee(axes, result["knee"])
    axes.set_xscale("log", base=2 if x == "global_batch" else 10)
    _plain_numbers(axes.xaxis)
    axes.set_xlabel(_LABELS[x])
    axes.set_ylabel(_LABELS[result["settings"]["measure"]])


def _plain_numbers(axis: Any) -> None:
    """Numbers without powers on a logarithmic axis; between the decades where there are less than two."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    chosen = LogFormatter(minor_thresholds=(2, 0.5))  # which of them get a number; it would write 0.2 as 2e-01
    chosen.set_axis(axis)

    def plain(value: float, position: int | None = None) -> str:
        chosen.set_locs(axis.get_minorticklocs())
        return f"{value:g}" if chosen(value, position) else ""

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(FuncFormatter(plain))


def _points(rows: Sequence[Result], x: str, which: str) -> list[tuple[float, Result]]:
    """Where rows stand on the axis of `x`, and what they have there."""
    return sorted(((row[x], row[which]) for row in rows if row[which]), key=lambda point: point[0])


def _draw_bars(axes: Any, points: Sequence[tuple[float, Result]], **style: Any) -> Any:
    """Means with bars of two standard deviations; returns their colour, None where there are no points."""
    if not points:
        return None
    means = [sample["mean"] for _, sample in points]
    above = [_STDS * (sample["std"] or 0.0) for _, sample in points]
    # On a logarithmic axis a bar that reached zero would have no end.
    shortest = 0.5 if axes.get_yscale() == "log" else 0.0
    below = [max(0.0, mean - max(mean - spread, shortest * mean)) for mean, spread in zip(means, above, strict=True)]
    drawn = axes.errorbar(
        [place for place, _ in points], means, yerr=[below, above], marker="o", markersize=4, capsize=3, **style
    )
    return drawn.lines[0].get_color()


def _mark_diverged(axes: Any, rows: Sequence[Result], x: str) -> None:
    """A cross at the upper edge for rows of which a seed has diverged, and how many of how many."""
    label = "diverged, of so many seeds"
    for row in rows:
        states = [run["state"] for run in row["runs"]]
        if "diverged" in states:
            place, across = row[x], axes.get_xaxis_transform()
            axes.plot([place], [0.97], marker="x", color="#e45756", transform=across, linestyle="none", label=label)
            label = "_nolegend_"
            words = f"{states.count('diverged')}/{len(states)}"
            axes.text(place, 0.95, words, transform=across, fontsize=8, ha="center", va="top", color="#e45756")


def _draw_knee(axes: Any, knee: Result) -> None:
    """The gradient noise scale, and where the error was seen to rise."""
    if knee["predicted"]:
        axes.axvline(knee["predicted"], color="#b279a2", linestyle="--", label="gradient noise scale")
    if knee["measured"]:
        low, high = knee["measured"]
        axes.axvspan(low, high, color="#e45756", alpha=0.12, label="error leaves the reference's")
