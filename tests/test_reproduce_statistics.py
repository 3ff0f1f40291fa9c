"""Means, Welch's test and the early sign, against textbook values and sums written here."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from largebatch.reproduce.curves import early_sign, read_curve
from largebatch.reproduce.knee import find_knee
from largebatch.reproduce.settings import Expectation, PaperValue
from largebatch.reproduce.statistics import Sample, Welch, sample, two_sided_p, welch
from largebatch.reproduce.tables import readme_block
from largebatch.reproduce.verdict import (
    best_of_lines,
    cannot_tell,
    check_expectation,
    compare_order,
    is_at_chance,
    paper_sample,
    verdict,
)


def tail_by_integration(t: float, degrees: float) -> float:
    """P(|T| >= t): 1 minus Simpson's integral of Student's density from -t to t."""
    intervals = 20_000
    width = 2 * t / intervals
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def density(x: float) -> float:
        return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    inner = sum((4 if i % 2 else 2) * density(-t + i * width) for i in range(1, intervals))
    return 1 - (density(-t) + density(t) + inner) * width / 3


@pytest.mark.parametrize("degrees", [1, 1.7, 2, 4, 7.31, 30, 250])
@pytest.mark.parametrize("t", [0.1, 0.8, 2.0, 5.0])
def test_p_is_the_area_under_the_density(t: float, degrees: float) -> None:
    assert two_sided_p(t, degrees) == pytest.approx(tail_by_integration(t, degrees), abs=1e-9)
    assert two_sided_p(-t, degrees) == two_sided_p(t, degrees)


@pytest.mark.parametrize(("t", "degrees"), [(12.706, 1), (4.303, 2), (2.776, 4), (2.228, 10), (2.042, 30)])
def test_p_at_the_critical_values_of_the_tables(t: float, degrees: int) -> None:
    assert two_sided_p(t, degrees) == pytest.approx(0.05, abs=5e-5)  # the tables round t


def test_welch_on_a_worked_example() -> None:
    first = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    second = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 30.5, 28.0]
    found = welch(sample(first), sample(second))
    assert found is not None
    # t and the degrees by their definitions, with the standard library's variance.
    a, b = (statistics.variance(values) / len(values) for values in (first, second))
    assert found.t == pytest.approx((statistics.mean(second) - statistics.mean(first)) / math.sqrt(a + b))
    assert found.degrees == pytest.approx((a + b) ** 2 / (a**2 / 14 + b**2 / 14))
    assert found.p == pytest.approx(tail_by_integration(abs(found.t), found.degrees), abs=1e-9)
    assert found.direction == 1


def test_no_test_without_a_spread() -> None:
    assert sample([]) is None
    assert sample([3.0]) == Sample(3.0, None, 1)
    assert welch(sample([1.0]), sample([2.0, 3.0])) is None
    assert welch(sample([1.0, 1.0]), sample([1.0, 1.0])) is None
    assert welch(None, sample([1.0, 2.0])) is None


def result(difference: float, p: float) -> Welch:
    return Welch(difference, 0.0, 4.0, p)


@pytest.mark.parametrize(
    ("ours", "papers", "agrees", "begins"),
    [
        (result(1, 0.01), result(2, 0.01), "yes", "agrees: higher in both"),
        (result(-1, 0.01), result(-2, 0.01), "yes", "agrees: lower in both"),
        (result(76, 0.01), result(1, 0.01), "open", "same sign, 76 times the paper's size: higher in both"),
        (result(1, 0.5), result(-2, 0.5), "yes", "agrees: no clear difference in either"),
        (result(1, 0.5), result(2, 0.01), "open", "not shown here: higher in the paper only"),
        (result(-1, 0.01), result(2, 0.5), "no", "differs: lower here only"),
        (result(-1, 0.01), result(2, 0.01), "no", "contradicts: lower here, higher in the paper"),
    ],
)
def test_the_words_follow_the_numbers(ours: Welch, papers: Welch, agrees: str, begins: str) -> None:
    found = verdict(ours, papers)
    assert found is not None
    assert found["agrees"] == agrees
    assert found["words"].startswith(begins)
    assert verdict(None, papers) is None


def test_the_order_of_table_1_against_itself_and_backwards() -> None:
    table = [(23.60, 0.12), (24.84, 0.37), (25.88, 0.56), (23.74, 0.09)]
    papers = [paper_sample(PaperValue(error=error, std=std)) for error, std in table]
    rows: list[dict[str, Any]] = [{"sample": p, "paper_sample": p} for p in papers]
    found = compare_order(rows)
    assert found is not None
    assert (found["same"], found["opposite"], found["undecided"]) == (found["pairs"], 0, 0)
    backwards = [{"sample": Sample(-p.mean, p.std, 5), "paper_sample": p} for p in papers if p]
    turned = compare_order(backwards)
    assert turned is not None
    assert (turned["same"], turned["opposite"]) == (0, found["pairs"])


def test_a_curve_is_the_mean_of_its_steps(tmp_path: Any) -> None:
    lines = ['{"step": 1, "e": 4.0}', '{"step": 4, "e": 1.0}', '{"step": 6, "e": null}', '{"step": 9, "e": 2.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_curve(tmp_path, "e", every_steps=4, steps=9) == [(4.0 + 3 * 1.0) / 4, None, 2.0]
    assert read_curve(tmp_path, "e", every_steps=4, steps=13)[-1] is None


def test_the_early_sign_is_a_curve_above_noise() -> None:
    reference = [[50.0, 20.0, 10.0, 9.0], [52.0, 21.0, 11.0, 10.0]]
    far = [[90.0, 30.0, 20.0, 19.0], [92.0, 31.0, 21.0, 20.0]]
    same = early_sign(reference, reference, first_epoch=1)
    left = early_sign(far, reference, first_epoch=1)
    assert same is not None
    assert left is not None
    assert (same.left, same.above) == (False, 0)
    assert (left.left, left.above, left.epochs) == (True, 3, 3)
    assert left.noise == pytest.approx(2 * math.sqrt(0.5 + 0.5))  # the variance of each row is 0.5 at every epoch
    assert early_sign(far[:1], reference, first_epoch=1) is None
    # One epoch in which a seed went astray hides none of the others.
    astray = early_sign([[90.0, 30.0, 20.0, 19.0], [92.0, 91.0, 21.0, 20.0]], reference, first_epoch=1)
    assert astray is not None
    assert (astray.left, astray.above) == (True, 2)


def size_row(kn: int, difference: float, p: float) -> dict[str, Any]:
    return {
        "name": str(kn),
        "global_batch": kn,
        "runs": [{"state": "finished"}],
        "comparison": {"difference": difference, "p": p} if kn != 256 else None,
    }


def test_the_knee_is_where_all_larger_minibatches_are_worse() -> None:
    rows = [size_row(kn, d, p) for kn, d, p in [(128, 2, 0.01), (256, 0, 1), (512, 1, 0.01), (1024, 0, 0.9)]]
    rows += [size_row(2048, 1, 0.04), size_row(4096, 9, 0.001)]
    found = find_knee(rows, "256", predicted=500.0)
    assert found["measured"] == [1024, 2048]
    assert found["ratio"] == pytest.approx(math.sqrt(1024 * 2048) / 500)
    assert found["words"].startswith("The error leaves the reference's between kn = 1024 and 2048.")
    waiting = {**size_row(8192, 0, 1), "runs": [{"state": "waiting"}], "comparison": None}
    assert find_knee([*rows, waiting], "256", None)["measured"] == [1024, 2048]
    diverged = {**waiting, "runs": [{"state": "diverged"}]}
    assert find_knee([rows[1], rows[3], diverged], "256", None)["measured"] == [1024, 8192]
    unclear = find_knee(rows[:4], "256", 500.0)
    assert (unclear["measured"], unclear["ratio"]) == (None, None)
    assert "not clearly above" in unclear["words"]


def lr_row(name: str, line: str, lr: float, mean: float, *, diverged: int = 0) -> dict[str, Any]:
    runs = [{"state": "diverged"}] * diverged + [{"state": "finished"}] * (3 - diverged)
    measured = Sample(mean, 0.1, 3 - diverged) if diverged < 3 else None
    return {"name": name, "line": line, "peak_lr": lr, "global_batch": 64, "sample": measured, "runs": runs}


def test_an_order_that_the_source_states_is_held_against_what_was_measured() -> None:
    rows = {row["name"]: row for row in (lr_row("a", "", 1, 1.0), lr_row("b", "", 1, 2.0), lr_row("c", "", 1, 1.02))}
    found = {
        (lower, than): check_expectation(Expectation(lower=lower, than=than), rows)["agrees"]
        for lower, than in [("a", "b"), ("b", "a"), ("a", "c")]
    }
    assert found == {("a", "b"): "yes", ("b", "a"): "no", ("a", "c"): "open"}
    lost = rows | {"a": lr_row("a", "", 1, 1.0, diverged=1)}
    assert check_expectation(Expectation(lower="a", than="b"), lost)["agrees"] == "open"
    nothing = rows | {"a": lr_row("a", "", 1, 1.0, diverged=3)}
    assert check_expectation(Expectation(lower="a", than="b"), nothing)["p"] is None


def test_the_best_rate_of_each_line_leaves_out_what_diverged() -> None:
    rows = [lr_row("a", "one", 0.1, 3.0), lr_row("b", "one", 0.2, 2.0), lr_row("c", "one", 0.4, 1.0, diverged=1)]
    rows += [lr_row("d", "two", 0.1, 1.0), lr_row("e", "two", 0.2, 2.0), lr_row("f", "", 0.1, 0.0)]
    found = {best["line"]: best for best in best_of_lines(rows)}
    assert {line: best["row"] for line, best in found.items()} == {"one": "b", "two": "d"}
    assert (found["one"]["at_the_edge"], found["one"]["diverged"]) == (False, [0.4])
    assert (found["two"]["at_the_edge"], found["two"]["diverged"]) == (True, [])


def test_time_counts_a_run_that_experiments_share_once() -> None:
    def result(name: str, runs: dict[str, float]) -> dict[str, Any]:
        made = [{"key": key, "seconds": seconds} for key, seconds in runs.items()]
        return {"experiment": name, "readme": False, "rows": [{"runs": made}]}

    results = [
        result("minibatch-size", {"a": 60.0, "d": 30.0}),
        result("remarks", {"a": 60.0, "b": 10.0}),
        result("warmup", {"a": 60.0, "c": 5.0}),
    ]
    words = readme_block(results, "x")
    assert "`remarks`, `warmup` together: 3 runs of 0:01:15 in all" in words
    assert "`minibatch-size` adds 1 runs of 0:00:30 in all" in words
    assert "`minibatch-size` together: 2 runs of 0:01:30 in all." in readme_block(results[:1], "x")


def test_at_chance_level_nothing_can_be_told() -> None:
    chance, guess, learned = 90.0, Sample(89.5, 0.3, 3), Sample(20.0, 0.3, 3)
    assert [is_at_chance(s, chance) for s in (guess, learned, None)] == [True, False, False]
    assert not is_at_chance(guess, None)
    assert cannot_tell("reference")["agrees"] == "open"
    assert cannot_tell("reference")["words"].startswith("cannot tell, since")
    worse = {**lr_row("b", "one", 0.2, 90.0), "at_chance": True, "paper_sample": Sample(20.0, 0.1, 5)}
    better = {**lr_row("a", "one", 0.1, 88.0), "at_chance": True, "paper_sample": Sample(10.0, 0.1, 5)}
    found = compare_order([better, worse])
    assert found is not None
    assert (found["same"], found["undecided"]) == (0, 1)
    rows = {"a": better, "b": worse}
    assert check_expectation(Expectation(lower="a", than="b"), rows)["agrees"] == "open"
    assert best_of_lines([better, worse]) == []
    knee = find_knee([{**size_row(256, 0, 1), "at_chance": True}, size_row(512, 1, 0.01)], "256", 500.0)
    assert knee["measured"] is None
    assert knee["words"].startswith("Cannot tell")
