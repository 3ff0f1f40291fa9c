"""The experiments that ship: at scale paper they are the paper's, at scale smoke they run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import ROOT, call

from largebatch.plan import Plan, make_plan
from largebatch.reproduce.folders import steps_of
from largebatch.reproduce.grid import Grid, Run, bare_code, make_grid
from largebatch.reproduce.settings import SCALES, read_experiment

IMAGES, VALIDATION = 1_281_167, 50_000
FILES = sorted((ROOT / "configs/reproduce").glob("*.yaml"))
GRADUAL, CONSTANT, NONE = "gradual", "constant", "none"
SIZES = {
    128: 0.05,
    256: 0.1,
    512: 0.2,
    1024: 0.4,
    2048: 0.8,
    4096: 1.6,
    8192: 3.2,
    16384: 6.4,
    32768: 12.8,
    65536: 25.6,
}
RATIOS = {128: "½ x reference", 256: "reference"}
# Row -> (kn, peak learning rate, warmup), read in the paper: Table 1, Figure 1, Tables 2a and 2b, §3.
PAPER: dict[str, dict[str, tuple[int, float, str]]] = {
    "warmup": {
        "reference": (256, 0.1, NONE),
        "none": (8192, 3.2, NONE),
        "constant": (8192, 3.2, CONSTANT),
        "gradual": (8192, 3.2, GRADUAL),
    },
    "minibatch-size": {
        RATIOS.get(kn, f"{kn // 256} x reference"): (kn, lr, GRADUAL if kn > 256 else NONE) for kn, lr in SIZES.items()
    },
    "lr-rules": {
        "small, η": (256, 0.1, NONE),
        "small, η/2": (256, 0.05, NONE),
        "small, 2η": (256, 0.2, NONE),
        "large, linear η": (8192, 3.2, GRADUAL),
        "large, linear η/2": (8192, 1.6, GRADUAL),
        "large, linear 2η": (8192, 6.4, GRADUAL),
        "large, η not scaled": (8192, 0.1, NONE),
        "large, √k η": (8192, 0.1 * 32**0.5, GRADUAL),
    },
    "last-gamma": {
        "small, γ = 0": (256, 0.1, NONE),
        "small, γ = 1": (256, 0.1, NONE),
        "large, γ = 0": (8192, 3.2, GRADUAL),
        "large, γ = 1": (8192, 3.2, GRADUAL),
    },
    "remarks": {
        "right": (8192, 3.2, GRADUAL),
        "right, no warmup": (8192, 3.2, NONE),
        "remark 1, loss scaled": (8192, 0.1, NONE),
        "remark 2, lr inside, corrected": (8192, 3.2, GRADUAL),
        "remark 2, lr inside, not corrected": (8192, 3.2, GRADUAL),
        "remark 3, loss over n": (8192, 3.2 / 256, NONE),
        "remark 4, a shuffle each": (8192, 3.2, GRADUAL),
        "BatchNorm decayed": (8192, 3.2, GRADUAL),
        "BatchNorm over 8 workers": (8192, 3.2, GRADUAL),
    },
    "past-8k": {
        "SGD, reference": (256, 0.1, NONE),
        **{f"SGD, {kn // 256} x reference": (kn, SIZES[kn], GRADUAL) for kn in SIZES if kn >= 8192},
        **{f"LARS, {kn // 256} x reference": (kn, 2.75 * (kn / 256) ** 0.5, GRADUAL) for kn in SIZES if kn >= 8192},
    },
}
ERRORS = {
    "warmup": [23.60, 24.84, 25.88, 23.74],
    "lr-rules": [23.60, 23.92, 23.68, 23.74, 24.27, 24.05, 41.67, 26.22],
    "last-gamma": [23.60, 23.84, 23.74, 24.11],
    "minibatch-size": [23.49, 23.60, 23.48, 23.53, 23.49, 23.56, 23.74, 24.79, 27.55, 33.96],
    "past-8k": [23.60, 23.74, 24.79, 27.55, 33.96],
}
STDS = {
    "warmup": [0.12, 0.37, 0.56, 0.09],
    "lr-rules": [0.12, 0.10, 0.09, 0.09, 0.08, 0.18, 0.10, 0.03],
    "last-gamma": [0.12, 0.18, 0.09, 0.07],
    "minibatch-size": [0.12, 0.12, 0.09, 0.08, 0.11, 0.12, 0.09, 0.27, 0.28, 0.80],
    "past-8k": [0.12, 0.09, 0.27, 0.28, 0.80],
}


def grid(name: str, scale: str) -> Grid:
    return make_grid(str(ROOT / f"configs/reproduce/{name}.yaml"), scale)  # type: ignore[arg-type]


def plan_of(run: Run) -> Plan:
    return make_plan(run.config, name=run.row, world_size=1, train_images=IMAGES, val_images=VALIDATION)


@pytest.mark.parametrize("name", PAPER)
def test_the_rows_at_scale_paper_are_the_papers(name: str) -> None:
    runs = grid(name, "paper").runs
    assert {run.row for run in runs} == PAPER[name].keys()
    for run in runs:
        kn, peak, warmup = PAPER[name][run.row]
        plan = plan_of(run)
        an_epoch = IMAGES // kn
        assert (plan.global_batch, plan.images_per_worker) == (kn, 32)
        assert plan.peak_lr == pytest.approx(peak, rel=1e-9)
        assert plan.warmup_kind == warmup
        assert plan.warmup_steps == (0 if warmup == NONE else 5 * an_epoch)
        assert plan.decay_steps == [30 * an_epoch, 60 * an_epoch, 80 * an_epoch]
        assert plan.total_steps == 90 * an_epoch
        assert plan.weight_decay == 1e-4
    assert sorted({run.seed for run in runs}) == [0, 1, 2, 3, 4]


def test_the_example_of_the_contract() -> None:
    (run, *_) = grid("warmup", "paper").row("gradual")
    plan = plan_of(run)
    assert (plan.warmup_steps, plan.reference_lr, plan.total_steps) == (780, 0.1, 14040)


@pytest.mark.parametrize("name", ERRORS)
def test_the_papers_values_are_the_papers(name: str) -> None:
    rows = read_experiment(ROOT / f"configs/reproduce/{name}.yaml").rows
    assert [row.paper.error for row in rows if row.paper] == ERRORS[name]
    assert [row.paper.std for row in rows if row.paper] == STDS[name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_scale_makes_valid_configs(file: Path) -> None:
    experiment = read_experiment(file)
    for scale in SCALES:
        if scale in experiment.scales:
            made = grid(file.stem, scale)
            assert all(steps_of(run) > 0 for run in made.runs)
            seeds = {run.seed for run in made.runs}
            assert len(seeds) >= {"smoke": 1, "cpu": 3, "gpu": 5, "paper": 5}[scale]
            assert {run.config.seed for run in made.runs} == seeds


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_note_has_two_thousand_iterations_of_each_kind(scale: str) -> None:
    runs = grid("sgd-gd-minibatch", scale).runs
    assert {steps_of(run) for run in runs} == {2000}
    images = {"cpu": 3000, "gpu": 60000}[scale]
    sizes = {"single images": 1, "minibatch": 64, "all images": images}
    for run in runs:
        kind, lr = run.row.split(", lr ")
        made = plan_of(run)
        assert (made.global_batch, made.peak_lr, made.warmup_kind) == (sizes[kind], float(lr), NONE)
        assert (run.config.optimizer.momentum, run.config.optimizer.weight_decay) == (0.0, 0.0)
        assert run.config.model.hidden == [100, 100, 100, 100]


def test_rows_that_are_the_same_share_one_run() -> None:
    gradual = grid("warmup", "cpu").row("gradual")
    assert [run.key for run in gradual] == [run.key for run in grid("lr-rules", "cpu").row("large, linear η")]
    assert [run.key for run in gradual] == [run.key for run in grid("last-gamma", "cpu").row("large, γ = 0")]
    assert [run.key for run in gradual] == [run.key for run in grid("remarks", "cpu").row("right")]
    assert [run.key for run in gradual] == [run.key for run in grid("minibatch-size", "cpu").row("4 x reference")]


def run_and_report(name: str, tmp_path: Path) -> tuple[dict, str]:  # type: ignore[type-arg]
    file = ROOT / f"configs/reproduce/{name}.yaml"
    done = call("reproduce", "run", file, "--scale", "smoke", "--out", tmp_path / "out")
    assert done.status == 0, done.out + done.err
    said = call("reproduce", "report", file, "--scale", "smoke", "--out", tmp_path / "out", "--into", tmp_path)
    assert said.status == 0, said.err
    folder = tmp_path / "smoke"
    return json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.md").read_text()


def test_warmup_at_scale_smoke(tmp_path: Path) -> None:
    result, text = run_and_report("warmup", tmp_path)
    assert [row["name"] for row in result["rows"]] == list(PAPER["warmup"])
    assert [row["peak_lr"] for row in result["rows"]] == [0.1, 0.2, 0.2, 0.2]
    assert all(row["result"]["n"] == 2 for row in result["rows"])
    assert all(len(row["curve"]) == 4 for row in result["rows"])
    assert "| reference | 256 | 0.1 |" in text
    assert "23.60 ± 0.12" in text
    assert "![warmup_curves.png](warmup_curves.png)" in text
    assert (tmp_path / "smoke/warmup_curves.png").read_bytes().startswith(b"\x89PNG")


def test_accumulation_at_scale_smoke_differs_by_exactly_zero(tmp_path: Path) -> None:
    result, text = run_and_report("accumulation", tmp_path)
    rows = {row["name"]: row for row in result["rows"]}
    for name in ("reproducible, 2 ranks", "reproducible, 3 ranks"):
        assert rows[name]["weights"] == [{"identical": True, "weight": 0.0, "statistics": 0.0}] * 2
        assert [run["value"] for run in rows[name]["runs"]] == [
            run["value"] for run in rows["reproducible, 1 rank"]["runs"]
        ]
    assert text.count("identical to the last bit (2 of 2 seeds)") == 2
    assert all(0 < found["weight"] < 1 for found in rows["fast, 2 ranks"]["weights"])
    assert "differ by up to" in text


def test_the_code_that_counts_is_the_code_without_its_words() -> None:
    plain = "class A:\n    x: int = 1\n\n    def f(self):\n        return self.x + 1\n"
    dressed = (
        '"""Module."""\n# why\nclass A:\n    \'\'\'What.\'\'\'\n    x : int=1\n    """Meant."""\n'
        '    def f( self ):\n        "Returns."\n        return (self.x +\n            1)  # one more\n'
    )
    assert bare_code(plain) == bare_code(dressed)
    assert bare_code(plain) != bare_code(plain.replace("+ 1", "+ 2"))
