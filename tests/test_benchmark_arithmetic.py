"""From windows to a breakdown and an efficiency; the options; what is measured for which mode."""

from __future__ import annotations

import pytest

from largebatch.benchmark.breakdown import Window, break_down, clearly_above_zero, efficiency
from largebatch.benchmark.cases import WITH_DDP, WITHOUT_DDP, Case, make_rows
from largebatch.benchmark.collectives import bandwidths
from largebatch.benchmark.measure import Measured
from largebatch.benchmark.options import Options, check_world, default_counts, parse_counts, parse_rate
from largebatch.benchmark.results import measurements
from largebatch.benchmark.tables import machine_text, tune_table
from largebatch.config import Config
from largebatch.errors import ConfigError, UserError


def _round(number: int, drift: float = 1.0, **seconds: tuple[float, ...]) -> list[Window]:
    return [Window(number, kind, 4, tuple(drift * s for s in found)) for kind, found in seconds.items()]


def _windows(*drifts: float) -> list[Window]:
    """Rank 1 computes longest: 10 ms, the optimizer 1, the exchange 4, data 2."""
    return [
        window
        for number, drift in enumerate(drifts)
        for window in _round(
            number,
            drift,
            compute=(0.009, 0.010),
            update=(0.010, 0.011),
            exchange=(0.015, 0.015),
            whole=(0.017, 0.017),
        )
    ]


def test_each_part_is_what_its_window_has_more_on_the_slowest_rank() -> None:
    found = break_down(_windows(1.0, 1.0, 1.0))
    assert found.step == pytest.approx(0.017)
    assert found.parts == pytest.approx(
        {"compute": 0.010, "other": 0.001, "exposed_communication": 0.004, "data_wait": 0.002}
    )
    assert found.closure == pytest.approx(0.0)
    assert found.slowest_rank == 1
    assert found.compute_by_rank == pytest.approx([0.009, 0.010])


def test_a_machine_that_becomes_slower_does_not_spoil_the_medians() -> None:
    found = break_down(_windows(1.0, 1.0, 5.0, 1.0, 1.1))
    assert found.parts["exposed_communication"] == pytest.approx(0.004)
    assert found.closure == pytest.approx(0.0)
    assert found.spread["step"] == pytest.approx(0.0017)  # quartiles at 1.0 and 1.1


def test_closure_tells_by_how_much_the_parts_miss_the_step() -> None:
    windows = _windows(1.0, 1.0, 1.0)
    # In two of three rounds something else made single windows longer.
    windows[0] = Window(0, "compute", 4, (0.012, 0.012))
    windows[6] = Window(1, "exchange", 4, (0.018, 0.018))
    found = break_down(windows)
    assert found.closure == pytest.approx(sum(found.parts.values()) / 0.017 - 1)


def test_one_rank_without_ddp_has_nothing_to_exchange() -> None:
    windows = _round(0, compute=(0.010,), update=(0.011,), whole=(0.014,))
    found = break_down(windows)
    assert found.parts == pytest.approx(
        {"compute": 0.010, "other": 0.001, "exposed_communication": 0.0, "data_wait": 0.003}
    )


def test_efficiency_is_of_each_round_by_itself() -> None:
    base = [Window(r, "whole", 4, (s,)) for r, s in enumerate((0.010, 0.020, 0.010))]
    own = [Window(r, "whole", 4, (s, s)) for r, s in enumerate((0.0125, 0.025, 0.0125))]
    found = efficiency("1 rank", own, 32, base, 32)
    assert (found.value, found.spread) == (pytest.approx(0.8), pytest.approx(0.0))
    # Strong scaling: half of the images each, in 60 % of the time.
    strong = [Window(r, "whole", 4, (0.6 * w.slowest,) * 2) for r, w in enumerate(base)]
    assert efficiency("1 rank", strong, 16, base, 32).value == pytest.approx(0.5 / 0.6)


@pytest.mark.parametrize(
    ("gains", "clear"),
    [
        ([0.10, 0.11, 0.09, 0.10, 0.12, 0.10, 0.08], True),
        ([0.10, 0.11, 0.09, 0.10, 0.12, 0.10, -0.01], False),  # one round of seven is slower
        ([0.10, 0.11, 0.09, 0.10, 0.12, 0.10, 0.09, 0.11, 0.10, -0.01], True),  # one of ten
        ([0.03, 0.11, 0.01, 0.05, 0.12, 0.02, 0.08], False),  # median 5 %; the middle half is 7 % wide
        ([0.10, 0.11, 0.09, 0.10], False),  # too few rounds
        ([0.0] * 7, False),
    ],
)
def test_a_gain_has_to_stand_out_of_the_rounds(gains: list[float], clear: bool) -> None:
    assert clearly_above_zero(gains) is clear


def test_the_table_of_settings_judges_by_the_raw_rounds() -> None:
    base = [100.0] * 7
    tried = [
        {"name": name, "gain": 0.1, "spread": 0.02, "numerics": "", "images_per_second": own,
         "images_per_second_as_configured": base}
        for name, own in (("lucky", [110.0] * 6 + [99.0]), ("better", [110.0] * 7))
    ]  # fmt: skip
    head, rows = tune_table({"tried": tried})
    assert head[2] == "faster beyond noise"
    assert {row[0]: row[2] for row in rows} == {"lucky": "no", "better": "yes"}


def test_a_machine_is_named_with_its_instructions_where_they_are_known() -> None:
    environment = {"cpu": {"model": "CPU", "cores": 2}, "packages": {"torch": "2.15.0"}, "python": "3.11.7"}
    assert machine_text(environment) == "CPU, 2 cores, torch 2.15.0, Python 3.11.7"
    environment["cpu"] = {"model": "CPU", "cores": 2, "capability": "AVX2", "bf16": False}
    assert machine_text(environment) == "CPU, 2 cores (AVX2, no bf16), torch 2.15.0, Python 3.11.7"
    environment["cpu"] = {"model": "CPU", "cores": 2, "capability": None, "bf16": None}
    assert machine_text(environment) == "CPU, 2 cores, torch 2.15.0, Python 3.11.7"


def test_bandwidths_are_those_of_nccl_tests() -> None:
    algbw, busbw = bandwidths(size=100_000_000, seconds=0.05, world_size=8)
    assert algbw == pytest.approx(2e9)
    assert busbw == pytest.approx(2e9 * 2 * 7 / 8)
    assert bandwidths(1000, 1.0, 2)[0] == bandwidths(1000, 1.0, 2)[1]


def _config(workers: int) -> Config:
    return Config.model_validate({"batch": {"virtual_workers": workers, "images_per_worker": 32}})


def test_weak_keeps_the_workers_of_a_rank_and_strong_the_minibatch() -> None:
    rows = make_rows(_config(12), Options(ranks=(1, 2, 3), mode="both"))
    weak = [row.case for row in rows if row.mode == "weak"]
    strong = [row.case for row in rows if row.mode == "strong"]
    assert weak == [Case(1, 4, False), Case(1, 4, True), Case(2, 8, True), Case(3, 12, True)]
    assert strong == [Case(1, 12, False), Case(1, 12, True), Case(2, 12, True), Case(3, 12, True)]


def test_the_noise_scale_is_not_measured_here_and_refuses_no_case() -> None:
    config = Config.model_validate(
        {
            "batch": {"virtual_workers": 2, "images_per_worker": 32},
            "execution": {"reduction": "reproducible"},
            "logging": {"noise_scale_every_steps": 10},
        }
    )
    with pytest.raises(ConfigError, match="needs two of them"):
        config.with_workers(1)
    for row in make_rows(config, Options(ranks=(1, 2))):
        made = row.case.config(config)
        assert made.batch.virtual_workers == row.case.virtual_workers
        assert made.logging.noise_scale_every_steps == 0
    assert config.logging.noise_scale_every_steps == 10


def test_workers_per_rank_may_be_said() -> None:
    rows = make_rows(_config(8), Options(ranks=(2, 3), workers_per_rank=4))
    assert [row.case.virtual_workers for row in rows] == [8, 12]


def test_k_that_does_not_divide_by_the_largest_n_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"8 do not divide by 3 ranks.*virtual_workers=9.*--workers-per-rank"):
        make_rows(_config(8), Options(ranks=(1, 3)))


def test_strong_scaling_to_more_ranks_than_workers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch.virtual_workers: 2 virtual workers.*too few for 3 ranks"):
        make_rows(_config(2), Options(ranks=(1, 3), mode="strong"))


def test_without_a_launcher_the_error_is_the_line_to_type() -> None:
    command = "benchmark config.yaml --ranks 1,2"
    with pytest.raises(UserError, match=f"torchrun --standalone --nproc-per-node=2 -m largebatch {command}$"):
        check_world(Options(ranks=(1, 2)), 1, command)


def test_more_ranks_than_the_launch_has_are_refused() -> None:
    with pytest.raises(UserError, match="--ranks: 8 is more than the 4 ranks of this launch"):
        check_world(Options(ranks=(1, 8)), 4, "benchmark")
    check_world(Options(ranks=(1, 3)), 4, "benchmark")


@pytest.mark.parametrize("text", ["", "0,1", "a", "1,,2", "-1", "1.5"])
def test_counts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--ranks"):
        parse_counts(text, "--ranks")


def test_counts_are_sorted_and_single() -> None:
    assert parse_counts("4, 1,2,2", "--ranks") == (1, 2, 4)
    assert [default_counts(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_rates_are_bits_a_second() -> None:
    assert parse_rate("50gbit", "--network") == 6.25e9
    assert parse_rate("200Mbit/s", "--network") == 25e6
    assert parse_rate("2.5 Gbps".replace("bps", "bitps"), "--network") == 312.5e6
    for wrong in ("50", "fast", "0gbit", "50GB"):
        with pytest.raises(UserError, match=r"--network: .* is not a rate"):
            parse_rate(wrong, "--network")


def _measured(case: Case, seconds: float) -> Measured:
    kinds = {"compute": 0.7, "update": 0.75, "exchange": 0.9, "whole": 1.0}
    if not case.ddp:
        del kinds["exchange"]
    windows = [
        Window(number, kind, 3, (share * seconds,) * case.world_size)
        for number in range(3)
        for kind, share in kinds.items()
    ]
    return Measured(case, 32 * case.virtual_workers, windows, peak_memory=[1 << 20] * case.world_size)


def test_every_baseline_that_was_measured_is_named() -> None:
    rows = make_rows(_config(8), Options(ranks=(1, 4, 8), mode="weak"))
    times = {1: 0.100, 4: 0.110, 8: 0.125}
    found = measurements(
        rows, {row.case: _measured(row.case, times[row.case.world_size]) for row in rows}, ranks_per_node=4
    )
    last = found[-1]
    assert (last["world_size"], last["global_batch"], last["baseline"]) == (8, 256, WITHOUT_DDP)
    assert {name: e["value"] for name, e in last["efficiencies"].items()} == pytest.approx(
        {WITHOUT_DDP: 0.8, WITH_DDP: 0.8, "1 node of 4 ranks": 0.88}
    )
    assert last["efficiency"] == pytest.approx(0.8)
    assert last["images_per_second"] == pytest.approx(256 / 0.125)


def test_without_one_rank_the_fewest_ranks_are_the_baseline() -> None:
    rows = make_rows(_config(4), Options(ranks=(2, 4)))
    found = measurements(rows, {row.case: _measured(row.case, 0.1) for row in rows}, ranks_per_node=16)
    assert [m["baseline"] for m in found] == ["2 ranks", "2 ranks"]
