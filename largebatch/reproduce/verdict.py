"""Whether a row shows here what it showed in the paper: decided by numbers, put into words."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from largebatch.reproduce.settings import Expectation, PaperValue
from largebatch.reproduce.statistics import SIGNIFICANT, Sample, Welch, welch

PAPERS_RUNS = 5
"""Independent runs behind each of the paper's values (§5.1)."""
_NOTHING_LEARNED = 0.9
"""From this share of the error (or loss) of guessing on, a row has learned too little to be compared with."""
_WORDS = {1: "higher", -1: "lower"}
_SAME_SIZE = 4.0
"""Two differences agree if neither is more than this many times the other."""


def paper_sample(value: PaperValue | None) -> Sample | None:
    """The paper's value as a sample of its five runs."""
    return None if value is None else Sample(value.error, value.std, PAPERS_RUNS)


def is_at_chance(measured: Sample | None, chance: float | None) -> bool:
    """Whether a row is hardly better than guessing; not where the number of classes, so `chance`, is unknown."""
    return measured is not None and chance is not None and measured.mean > _NOTHING_LEARNED * chance


def cannot_tell(row: str) -> dict[str, str]:
    """The verdict where the row that is compared with has learned nothing: any training looks alike from there."""
    return {"agrees": "open", "words": f"cannot tell, since *{row}*, which it is compared with, is at chance level"}


def verdict(ours: Welch | None, papers: Welch | None) -> dict[str, str] | None:
    """``agrees`` (yes, no or open) and the reason in ``words``; None where either cannot be tested.

    A direction counts if Welch's test gives p < 0.05. A difference found only in the paper leaves the question open: it
    may exist but be too small for so few seeds. So does one of the same sign and another order of size.
    """
    if ours is None or papers is None:
        return None
    here, there = ours.direction, papers.direction
    seen = f"{ours.difference:+.2f} here (p = {ours.p:.2g}), {papers.difference:+.2f} in the paper (p = {papers.p:.2g})"
    if here == there:
        said = f"{_WORDS[here]} in both" if here else "no clear difference in either"
        ratio = ours.difference / papers.difference if here else 1.0
        if not 1 / _SAME_SIZE <= ratio <= _SAME_SIZE:
            return {"agrees": "open", "words": f"same sign, {ratio:.2g} times the paper's size: {said}: {seen}"}
        return {"agrees": "yes", "words": f"agrees: {said}: {seen}"}
    if here == 0:
        return {"agrees": "open", "words": f"not shown here: {_WORDS[there]} in the paper only: {seen}"}
    if there == 0:
        return {"agrees": "no", "words": f"differs: {_WORDS[here]} here only: {seen}"}
    return {"agrees": "no", "words": f"contradicts: {_WORDS[here]} here, {_WORDS[there]} in the paper: {seen}"}


def renew_verdicts(rows: Sequence[dict[str, Any]]) -> None:
    """Decide the verdicts of a report's rows again, from the numbers in its JSON."""
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        against = by_name.get(row["against"], row)
        if row["verdict"] and not against.get("at_chance"):
            papers = welch(Sample(**against["paper"]), Sample(**row["paper"]))
            row["verdict"] = verdict(Welch(**row["comparison"]), papers)


def check_expectation(order: Expectation, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether the row that the source has lower is lower here: ``agrees`` is yes, no or open, as for `verdict`.

    A row of which a seed has diverged is not lower than any, whatever the mean of the others, and of two rows at chance
    level none is.
    """
    lower, than = rows[order.lower], rows[order.than]
    difference = welch(than["sample"], lower["sample"])
    direction = difference.direction if difference else 0
    if (direction == -1 and _diverged(lower)) or (lower.get("at_chance") and than.get("at_chance")):
        direction = 0
    return {
        "lower": order.lower,
        "than": order.than,
        "p": difference.p if difference else None,
        "agrees": {-1: "yes", 0: "open", 1: "no"}[direction],
    }


def best_of_lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each line of rows with several learning rates, the row whose measure is lowest.

    Rows of which a seed has diverged are no candidates, and are counted.
    """
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["line"], []).append(row)
    best_rows = []
    for line, members in lines.items():
        usable = [row for row in members if row["sample"] and not _diverged(row) and not row.get("at_chance")]
        if line and usable and len({row["peak_lr"] for row in members}) > 1:
            best = min(usable, key=lambda row: row["sample"].mean)
            rates = [row["peak_lr"] for row in members]
            best_rows.append(
                {
                    "line": line,
                    "row": best["name"],
                    "global_batch": best["global_batch"],
                    "peak_lr": best["peak_lr"],
                    "at_the_edge": best["peak_lr"] in (min(rates), max(rates)),
                    "diverged": [row["peak_lr"] for row in members if _diverged(row)],
                }
            )
    return best_rows


def _diverged(row: Mapping[str, Any]) -> bool:
    return any(run["state"] == "diverged" for run in row["runs"])


def compare_order(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How the pairs of rows that the paper distinguishes are ordered here; None if it distinguishes none."""
    usable = [r for r in rows if r["sample"] and r["paper_sample"]]
    same = opposite = undecided = 0
    for a, b in itertools.combinations(usable, 2):
        papers, ours = welch(a["paper_sample"], b["paper_sample"]), welch(a["sample"], b["sample"])
        if papers is None or papers.direction == 0:
            continue
        both_at_chance = a.get("at_chance") and b.get("at_chance")
        sign = 0 if ours is None or both_at_chance else ours.direction * papers.direction
        same, opposite, undecided = same + (sign > 0), opposite + (sign < 0), undecided + (sign == 0)
    pairs = same + opposite + undecided
    if not pairs:
        return None
    words = (
        f"Of {pairs} pairs of rows that the paper's numbers distinguish (p < {SIGNIFICANT}), {same} are ordered "
        f"in the same way here, {opposite} the other way round, and {undecided} cannot be distinguished here."
    )
    return {"pairs": pairs, "same": same, "opposite": opposite, "undecided": undecided, "words": words}
