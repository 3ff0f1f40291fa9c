"""The words and tables of a report, made of its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from largebatch.reproduce.curves import describe_sign

README_BEGIN, README_END = "<!-- reproduce:begin -->", "<!-- reproduce:end -->"
_MEASURES = {
    "top1_error": "top-1 error (%): median of the last five evaluations",
    "train_loss": "training loss at the end",
}
_DIGITS = {"top1_error": 2, "train_loss": 3}
Result = Mapping[str, Any]


def markdown(result: Result, plots: Sequence[str]) -> str:
    """The whole report of an experiment; `plots` are file names next to it."""
    settings = result["settings"]
    parts = [
        f"# {settings['title']}, at scale {result['scale']}",
        f"{settings['source']}. {settings['text']}",
        f"What is compared: {_MEASURES[settings['measure']]}, mean ± standard deviation over seeds (their number in "
        f"brackets), each row compared with *{settings['reference']}* unless it says otherwise.",
        results_table(result),
        *_paragraphs(result),
        *(f"![{name}]({name})" for name in plots),
        *_curve_table(result),
        "## The rows as commands",
        "\n".join(f"- {row['name']}: `{row['command']} seed=0`{_on_ranks(row)}" for row in result["rows"]),
        "## How this was run",
        _provenance(result["provenance"]),
    ]
    return "\n\n".join(parts) + "\n"


def results_table(result: Result) -> str:
    """A line for each row: what was measured, what the paper has, and how they compare."""
    rows, digits = result["rows"], _DIGITS[result["settings"]["measure"]]
    columns = ["row", "kn", "peak lr", "here"]
    has = {
        key: any(row.get(key) for row in rows)
        for key in ("paper", "comparison", "early_sign", "weights", "noise_scale")
    }
    columns += ["the paper"] * has["paper"] + ["difference", "p"] * has["comparison"]
    columns += ["training curve"] * has["early_sign"] + ["weights"] * has["weights"]
    columns += ["gradient noise scale"] * has["noise_scale"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [row["name"], str(row["global_batch"]), _number(row["peak_lr"], "g"), measured(row, digits)]
        cells += [mean_std(row["paper"])] * has["paper"]
        cells += _difference(row, result) * has["comparison"]
        cells += [_sign(row, result)] * has["early_sign"]
        cells += [_weights(row["weights"])] * has["weights"]
        cells += [_number(row["noise_scale"], ".0f")] * has["noise_scale"]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def measured(row: Result, digits: int = 2) -> str:
    """Mean ± std (n) of a row, and what became of the seeds that gave no number."""
    states = [run["state"] for run in row["runs"]]
    others = [f"{states.count(state)} {state}" for state in sorted(set(states)) if state != "finished"]
    number = f"{mean_std(row['result'], digits)} ({row['result']['n']})" if row["result"] else ""
    return "; ".join(part for part in (number, *others) if part)


def mean_std(sample: Result | None, digits: int = 2) -> str:
    """``23.60 ± 0.12``."""
    if sample is None:
        return ""
    spread = "" if sample["std"] is None else f" ± {sample['std']:.{digits}f}"
    return f"{sample['mean']:.{digits}f}{spread}"


def readme_block(results: Sequence[Result], folder: str) -> str:
    """What docs/results.md shows: the table and verdicts of each result that asks for it, with a link to the report in
    `folder`, and how long all `results` took."""
    parts = []
    for result in [result for result in results if result["readme"]]:
        name, provenance = result["experiment"], result["provenance"]
        parts += [
            f"**{result['settings']['title']}** ({result['settings']['source']}), scale `{result['scale']}`:",
            results_table(result),
            *_at_chance(result),
            *_verdicts(result),
            *([result["knee"]["words"]] if result["knee"] else []),
            "\n".join(
                f"![{result['settings']['title']}, {plot['name']}]({folder}/{name}_{plot['name']}.png)"
                for plot in result["plots"]
            ),
            f"`{provenance['command']}` on {'; '.join(provenance['machines'])}, {_duration(provenance)}; [report]"
            f"({folder}/{name}.md)",
        ]
    return "\n\n".join([*parts, _all_durations(results)])


def _all_durations(results: Sequence[Result]) -> str:
    """Seconds of training of all experiments; a run that several share counts once, where it is met first."""
    seen: set[str] = set()
    durations = {}
    for result in sorted(results, key=lambda result: result["experiment"] == "minibatch-size"):
        runs = {run["key"]: run.get("seconds", 0.0) for row in result["rows"] for run in row["runs"]}
        new = {key: seconds for key, seconds in runs.items() if key not in seen}
        seen |= new.keys()
        durations[result["experiment"]] = (len(new), sum(new.values()))
    last = durations.pop("minibatch-size", None) if len(durations) > 1 else None
    names = ", ".join(f"`{name}`" for name in durations)
    said = f"{names} together: {_runs_and_time(*map(sum, zip(*durations.values(), strict=True)))}"
    return said + (f"; `minibatch-size` adds {_runs_and_time(*last)}." if last else ".")


def _runs_and_time(runs: float, seconds: float) -> str:
    return f"{runs:.0f} runs of {timedelta(seconds=round(seconds))} in all"


def put_into(text: str, block: str) -> str | None:
    """`text` with `block` between its markers; None if it has no markers."""
    before, begin, rest = text.partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    return f"{before}{begin}\n{block}\n{end}{after}" if begin and end else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _difference(row: Result, result: Result) -> list[str]:
    found = row["comparison"]
    if not found:
        return ["", ""]
    other = "" if _is_reference(row, result) else f" (against {row['against']})"
    digits = _DIGITS[result["settings"]["measure"]]
    return [f"{found['difference']:+.{digits}f}{other}", f"{found['p']:.2g}"]


def _sign(row: Result, result: Result) -> str:
    """Whether the training curve leaves that of the row it is held against."""
    if not row["early_sign"]:
        return ""
    return describe_sign(row["early_sign"], "the reference's" if _is_reference(row, result) else f"{row['against']}'s")


def _is_reference(row: Result, result: Result) -> bool:
    return row["against"] == result["settings"]["reference"]


def _weights(distances: Sequence[Result | None] | None) -> str:
    if not distances:
        return ""
    known = [d for d in distances if d]
    if all(d["identical"] for d in known) and known:
        return f"identical to the last bit ({len(known)} of {len(distances)} seeds)"
    if not known:
        return ""
    weight, statistics = (max(d[key] for d in known) for key in ("weight", "statistics"))
    return f"differ by up to {weight:.2g} (BatchNorm's running statistics by {statistics:.2g})"


def _paragraphs(result: Result) -> list[str]:
    order = [result["order"]["words"]] if result["order"] else []
    knee = [result["knee"]["words"]] if result["knee"] else []
    return [*_at_chance(result), *_verdicts(result), *order, *_expected(result), *_best(result), *knee]


def _at_chance(result: Result) -> list[str]:
    """Which rows are no better than guessing."""
    names = [f"*{row['name']}*" for row in result["rows"] if row.get("at_chance")]
    if not names:
        return []
    level = f"{result['chance']:.{_DIGITS[result['settings']['measure']]}f}"
    return [f"At chance level ({level} by guessing), so comparing them shows nothing: {', '.join(names)}."]


def _verdicts(result: Result) -> list[str]:
    """Whether each row shows what the paper showed."""
    found = [(row["name"], row["verdict"]["words"]) for row in result["rows"] if row["verdict"]]
    lines = [f"- *{name}*{':' * words.startswith('cannot')} {words}" for name, words in found]
    return ["\n".join(lines)] if lines else []


def _expected(result: Result) -> list[str]:
    """Whether the orders that the source states are seen here."""
    rows = {row["name"]: row for row in result["rows"]}
    digits = _DIGITS[result["settings"]["measure"]]
    said = {"yes": "agrees", "no": "contradicts", "open": "not shown here"}
    lines = []
    for order in result["expected"]:
        lower, than = rows[order["lower"]], rows[order["than"]]
        p = "" if order["p"] is None else f" (p = {order['p']:.2g})"
        lines.append(
            f"- {said[order['agrees']]}: the source reports *{lower['name']}* below *{than['name']}*; here they are at "
            f"{measured(lower, digits)} and {measured(than, digits)}{p}"
        )
    return ["\n".join(lines)] if lines else []


def _best(result: Result) -> list[str]:
    """Which learning rate each line of rows wants."""
    rows = {row["name"]: row for row in result["rows"]}
    digits = _DIGITS[result["settings"]["measure"]]
    lines = []
    for best in result["best"]:
        edge = "; this is the edge of the range tried, so the best may lie beyond it" if best["at_the_edge"] else ""
        lost = ", ".join(f"{lr:g}" for lr in best["diverged"])
        lines.append(
            f"- *{best['line']}* (kn = {best['global_batch']}): {best['peak_lr']:g}, with "
            f"{measured(rows[best['row']], digits)}{edge}" + (f"; at least one seed diverged at {lost}" if lost else "")
        )
    return ["The learning rate with the lowest value for each:\n\n" + "\n".join(lines)] if lines else []


def _curve_table(result: Result) -> list[str]:
    """The training curves as a table, where the experiment asks for it."""
    every = result["curve"]["every_steps"]
    if not result["curve"]["table"] or every is None:
        return []
    rows = [row for row in result["rows"] if row["curve"] and row["in_table"]]
    length = max((len(row["curve"]) for row in rows), default=0)
    lines = [["step", *(row["name"] for row in rows)], ["---"] * (len(rows) + 1)]
    for i in range(length):
        points = [row["curve"][i] if i < len(row["curve"]) else None for row in rows]
        lines.append([str((i + 1) * every), *(mean_std(point, 3) for point in points)])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return [f"`{result['curve']['metric']}`, the mean of each {every} steps:", table]


def _on_ranks(row: Result) -> str:
    return f", on {row['ranks']} rank{'s' * (row['ranks'] > 1)}" if row["ranks"] else ""


def _provenance(provenance: Result) -> str:
    facts = {
        "command": f"`{provenance['command']}`",
        "commit": ", ".join(provenance["commits"]) or "not from a git checkout",
        "hardware": "; ".join(provenance["machines"]),
        "versions": "; ".join(provenance["versions"]),
        "duration": _duration(provenance),
    }
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())


def _duration(provenance: Result) -> str:
    return f"{timedelta(seconds=round(provenance['seconds']))} of training, summed over runs"
