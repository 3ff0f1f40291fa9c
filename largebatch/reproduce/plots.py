"""The plots of a report, made of its JSON."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from largebatch.report.figure import Warn, draw, explain, panels, plain

_LABELS = {
    "train/top1_error": "training top-1 error (%)",
    "train/loss": "training loss (nats per image)",
    "top1_error": "validation top-1 error (%)",
    "train_loss": "training loss at the end (nats per image)",
    "global_batch": "minibatch kn (images)",
    "peak_lr": "learning rate",
}
_HIGHEST = {"train/top1_error": 100.0, "top1_error": 100.0}
_LOG_FROM = 4.0
_ENTRIES_INSIDE = 6  # a longer legend would hide what is drawn
_STDS = 2.0  # Figure 1 has bars of two standard deviations
_SIZE = (7.5, 5)  # inches of a panel
_BARS = "points: means over seeds; bars: ± 2 standard deviations, within what is possible"
Result = Mapping[str, Any]


def draw_plots(result: Result, folder: Path, warn: Warn) -> list[str]:
    """Draw every plot of `result` into `folder`; returns the names of the files."""
    names = []
    for plot in result["plots"]:
        name = f"{result['experiment']}_{plot['name']}.png"
        rows = [row for row in result["rows"] if not plot["rows"] or row["name"] in plot["rows"]]
        if draw(folder / name, functools.partial(_figure, plot, rows, result), warn):
            names.append(name)
    return names


def _figure(plot: Result, rows: Sequence[Result], result: Result) -> Any:
    if plot["kind"] == "dots":
        return _dots(rows, result)
    figure, (axes,) = panels(size=_SIZE)
    if plot["kind"] == "curves":
        _draw_curves(axes, rows, result)
        caption = "lines: means over seeds; bands: ± 1 standard deviation"
    else:
        _draw_sweep(axes, rows, plot["x"], result)
        caption = _BARS + "; on a logarithmic axis down to half the mean" * (axes.get_yscale() == "log")
    explain(figure, _title(result), caption)
    entries = len(axes.get_legend_handles_labels()[0])
    if entries > _ENTRIES_INSIDE:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif entries:
        axes.legend(fontsize=8)
    return figure


def _title(result: Result) -> str:
    """Experiment and scale; model, data set and seeds, as far as the JSON says them."""
    first = f"{result['settings']['title']}, scale {result['scale']}"
    seeds = max(len(row["runs"]) for row in result["rows"])
    trained = result.get("trained")
    on = f"{trained['model']} on {trained['data']}, " if trained else ""
    return f"{first}\n{on}{seeds} seed{'s' * (seeds > 1)}"


def _within(mean: float, spread: float, metric: str) -> tuple[float, float]:
    """The interval around `mean`, as far as `metric` can go."""
    return max(0.0, mean - spread), min(_HIGHEST.get(metric, mean + spread), mean + spread)


def _draw_curves(axes: Any, rows: Sequence[Result], result: Result) -> None:
    """Mean curves, with a band of one standard deviation on each side."""
    every, metric = result["curve"]["every_steps"], result["curve"]["metric"]
    for row in rows:
        points = [((i + 1) * (every or 1), point) for i, point in enumerate(row["curve"]) if point]
        if not points:
            continue
        x = [place for place, _ in points]
        mean = [point["mean"] for _, point in points]
        label = plain(f"{row['name']} (kn = {row['global_batch']})")
        (line,) = axes.plot(x, mean, label=label, linewidth=1.2)
        band = [_within(point["mean"], point["std"] or 0.0, metric) for _, point in points]
        axes.fill_between(x, *zip(*band, strict=True), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("step" if every else "epoch")
    axes.set_ylabel(_LABELS[metric])


def _dots(rows: Sequence[Result], result: Result) -> Any:
    """A line for each row, for experiments with more rows than distinguishable curves."""
    which = [name for name in ("result", "paper") if any(row[name] for row in rows)] or ["result"]
    size = (8.0 if len(which) == 1 else 5.5, 1.5 + 0.35 * len(rows))
    figure, axes_of = panels(columns=len(which), size=size, sharey=True)
    measure = result["settings"]["measure"]
    for axes, name in zip(axes_of, which, strict=True):
        found = [(place, row[name]) for place, row in enumerate(rows) if row[name]]
        means = [sample["mean"] for _, sample in found]
        errors = _bars(axes, [sample for _, sample in found], measure)
        style = {"fmt": "o", "capsize": 3, "color": "#4c78a8" if name == "result" else "#9d9d9d"}
        axes.errorbar(means, [place for place, _ in found], xerr=errors, **style)
        for place, row in enumerate(rows):
            if name == "result" and row["name"] == result["settings"]["reference"] and row[name]:
                axes.axvline(row[name]["mean"], color="#4c78a8", linestyle=":", linewidth=1)
            diverged = sum(run["state"] == "diverged" for run in row["runs"])
            if name == "result" and diverged:
                words = f"{diverged} of {len(row['runs'])} seeds diverged "
                axes.text(1, place, words, color="#e45756", ha="right", va="bottom", fontsize=8,
                          transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set_title("here" if name == "result" else "in the paper", fontsize="medium")
        axes.set_xlabel(_LABELS[measure])
    labels = [plain(f"{row['name']} (kn = {row['global_batch']})") for row in rows]
    axes_of[0].set_yticks(range(len(rows)), labels)
    axes_of[0].set_ylim(len(rows) - 0.5, -0.5)
    explain(figure, _title(result), f"{_BARS}\ndotted line: {result['settings']['reference']}, the reference")
    return figure


def _bars(axes: Any, samples: Sequence[Result], metric: str) -> tuple[list[float], list[float]]:
    """Lengths of the bars below and above each mean."""
    intervals = [_within(s["mean"], _STDS * (s["std"] or 0.0), metric) for s in samples]
    # On a logarithmic axis a bar that reached zero would have no end.
    shortest = 0.5 if axes.get_yscale() == "log" else 0.0
    pairs = list(zip(samples, intervals, strict=True))
    below = [max(0.0, s["mean"] - max(low, shortest * s["mean"])) for s, (low, _) in pairs]
    return below, [max(0.0, high - s["mean"]) for s, (_, high) in pairs]


def _draw_sweep(axes: Any, rows: Sequence[Result], x: str, result: Result) -> None:
    """What was measured with bars of two standard deviations, next to the paper's values for the same rows."""
    measure = result["settings"]["measure"]
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
        label = plain(name or ("here" if alone else "others"))
        points = _points(members, x, "result")
        color = _draw_bars(axes, points, measure, label=label, linestyle="-" if joined else "none")
        paper = {"color": color, "alpha": 0.55, "linestyle": ":"} if name else {"color": "#9d9d9d", "linestyle": ":"}
        label = plain(f"{name or 'the same rows'}, in the paper")
        _draw_bars(axes, _points(members, x, "paper"), measure, label=label, **paper)
    _mark_diverged(axes, rows, x)
    if result.get("knee") and x == "global_batch":
        _draw_knee(axes, result["knee"])
    axes.set_xscale("log", base=2 if x == "global_batch" else 10)
    _plain_numbers(axes.xaxis)
    axes.set_xlabel(_LABELS[x])
    axes.set_ylabel(_LABELS[measure])


def _plain_numbers(axis: Any) -> None:
    """Numbers without powers on a logarithmic axis; between the decades where there are less than two."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    chosen = LogFormatter(minor_thresholds=(2, 0.5))  # which of them get a number; it would write 0.2 as 2e-01
    chosen.set_axis(axis)

    def number(value: float, position: int | None = None) -> str:
        chosen.set_locs(axis.get_minorticklocs())
        return f"{value:g}" if chosen(value, position) else ""

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(FuncFormatter(number))


def _points(rows: Sequence[Result], x: str, which: str) -> list[tuple[float, Result]]:
    """Where rows stand on the axis of `x`, and what they have there."""
    return sorted(((row[x], row[which]) for row in rows if row[which]), key=lambda point: point[0])


def _draw_bars(axes: Any, points: Sequence[tuple[float, Result]], metric: str, **style: Any) -> Any:
    """Means with bars of two standard deviations; returns their colour, None where there are no points."""
    if not points:
        return None
    places, samples = zip(*points, strict=True)
    bars = _bars(axes, samples, metric)
    means = [sample["mean"] for sample in samples]
    drawn = axes.errorbar(places, means, yerr=bars, marker="o", markersize=4, capsize=3, **style)
    return drawn.lines[0].get_color()


def _mark_diverged(axes: Any, rows: Sequence[Result], x: str) -> None:
    """A cross at the upper edge for rows of which a seed has diverged, and how many of how many."""
    label = "diverged, out of the seeds shown"
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
