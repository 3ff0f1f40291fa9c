"""`largebatch reproduce`: runs, kills, changes and reports, on the digits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_folders import ROOT, call, tensor_hashes

from largebatch.reproduce.grid import make_grid
from largebatch.reproduce.plots import _within, draw_plots

BASE = ROOT / "configs/reproduce/base/smoke.yaml"
EXPERIMENT = f"""
title: Small
source: Nowhere
text: Two rows.
reference: small
plots: [{{name: curves, kind: curves}}, {{name: size, kind: sweep}}]
readme: true
rows:
  - {{name: small, config: {{batch: {{virtual_workers: 2}}}}, paper: {{error: 23.6, std: 0.1}}}}
  - {{name: large, paper: {{error: 24.9, std: 0.2}}}}
  - {{name: large again, at: {{smoke: {{batch: {{virtual_workers: 8}}}}}}}}
scales:
  smoke:
    base: {BASE}
    config:
      data: {{train_images: 256, val_images: 60}}
      batch: {{images_per_worker: 8}}
      schedule: {{reference_batch: 64, epochs: 20}}
      checkpoint: {{every_steps: 3}}
    seeds: 2
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(EXPERIMENT)
    return path


def arguments(experiment: Path, out: Path) -> list[str]:
    return [str(experiment), "--scale", "smoke", "--out", str(out)]


def report(experiment: Path, out: Path, into: Path) -> dict[str, bytes]:
    """The files of a report, by name."""
    done = call("reproduce", "report", *arguments(experiment, out), "--into", into)
    assert done.status == 0, done.err
    return {path.name: path.read_bytes() for path in sorted((into / "smoke").iterdir())}


def timeless(files: dict[str, bytes]) -> dict[str, Any]:
    """A report without what a clock said."""
    result = json.loads(files["small.json"])
    del result["provenance"]
    for run in (run for row in result["rows"] for run in row["runs"]):
        del run["seconds"]
    text = files["small.md"].decode().partition("## How this was run")[0]
    return {**files, "small.json": result, "small.md": text}


def killed_at_work(experiment: Path, out: Path, delay: float, *, everybody: bool) -> bool:
    """Start the runner, and kill it `delay` seconds after something moves; False if it came to its end before."""
    command = [sys.executable, "-m", "largebatch", "reproduce", "run", *arguments(experiment, out), "--jobs", "2"]

    def sizes() -> dict[Path, int]:
        return {path: path.stat().st_size for path in (out / "smoke/runs").glob("*/metrics.jsonl")}

    before, deadline = sizes(), time.monotonic() + 60
    runner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while runner.poll() is None and sizes() == before and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    if runner.poll() is None and everybody:
        os.killpg(runner.pid, signal.SIGKILL)
    else:
        runner.kill()  # its runs are left behind, and stop
    return runner.wait() == -signal.SIGKILL


@pytest.mark.timeout(600)
def test_a_row_starts_from_the_same_seed_of_another(experiment: Path, tmp_path: Path) -> None:
    """As one would by hand: train the one, then the other from its model.pt."""
    tuned = "{name: tuned, base: digits, start: small, config: {schedule: {epochs: 2}, data: {val_images: 60}}}"
    rows = [line for line in EXPERIMENT.replace("epochs: 20", "epochs: 4").splitlines() if "name: large" not in line]
    experiment.write_text("\n".join(rows).replace("scales:", f"  - {tuned}\nscales:"))
    done = call("reproduce", "run", *arguments(experiment, tmp_path / "out"), "--jobs", "3")
    assert done.status == 0, done.out + done.err
    grid = make_grid(str(experiment), "smoke")
    folders = {(run.row, run.seed): tmp_path / "out/smoke/runs" / run.key for run in grid.runs}
    for seed in (0, 1):
        by_hand = tmp_path / str(seed)
        start = f"model.init_from={folders['small', seed]}"
        train = call(
            "train", "digits", "--run-dir", by_hand, start, "schedule.epochs=2", "data.val_images=60", f"seed={seed}"
        )
        assert train.status == 0, train.err
        assert tensor_hashes(by_hand) == tensor_hashes(folders["tuned", seed])
    experiment.write_text(experiment.read_text().replace("epochs: 4", "epochs: 5"))
    assert {run.key for run in make_grid(str(experiment), "smoke").row("tuned")}.isdisjoint(
        run.key for run in grid.runs
    )
    experiment.write_text(experiment.read_text().replace("start: small", "start: tuned"))
    refused = call("reproduce", "status", *arguments(experiment, tmp_path / "out"))
    assert refused.status == 2
    assert "starts from 'tuned', which must come before it" in refused.err


@pytest.mark.timeout(600)
def test_killed_ten_times_at_random_points_it_reports_the_same(experiment: Path, tmp_path: Path) -> None:
    whole = call("reproduce", "run", *arguments(experiment, tmp_path / "whole"), "--jobs", "2")
    assert whole.status == 0, whole.out + whole.err
    assert "4 runs (2 more are the same as one of these)" in whole.out
    expected = report(experiment, tmp_path / "whole", tmp_path / "a")
    assert report(experiment, tmp_path / "whole", tmp_path / "b") == expected, "a report twice gives the same bytes"

    # A quick machine has done all before it was killed ten times: then it does it once more.
    outs, draw = [tmp_path / "killed-1"], random.Random(1)
    for life in range(10):
        while not killed_at_work(experiment, outs[-1], draw.uniform(0, 0.5), everybody=life % 2 == 1):
            outs.append(tmp_path / f"killed-{len(outs) + 1}")
            assert len(outs) < 20, "it always comes to its end before it is killed"
    for out in outs:
        last = call("reproduce", "run", *arguments(experiment, out), "--jobs", "2")
        assert last.status == 0, last.out + last.err
        assert timeless(report(experiment, out, tmp_path / "reports" / out.name)) == timeless(expected)
        for folder in (tmp_path / "whole/smoke/runs").iterdir():
            assert tensor_hashes(folder) == tensor_hashes(out / "smoke/runs" / folder.name)


def test_what_is_done_is_not_done_again_and_what_changed_is_told(experiment: Path, tmp_path: Path) -> None:
    one_seed = EXPERIMENT.replace("seeds: 2", "seeds: 1").replace("epochs: 20", "epochs: 4")
    experiment.write_text(one_seed)
    asked = arguments(experiment, tmp_path / "out")
    assert call("reproduce", "run", *asked).status == 0
    folders = sorted((tmp_path / "out/smoke/runs").iterdir())
    written = {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}

    again = call("reproduce", "run", *asked)
    assert again.status == 0
    assert "2 runs (1 more are the same as one of these), of which 2 are already done" in again.out
    assert {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()} == written

    experiment.write_text(one_seed.replace("name: large,", "name: large, config: {optimizer: {momentum: 0.5}},"))
    changed = call("reproduce", "run", *asked)
    assert changed.status == 0
    assert "small: large (seed 0): to be run again, because optimizer.momentum: was 0.9, now 0.5" in changed.out
    assert "small (seed 0)" not in changed.out
    assert "3 runs, of which 2 are already done" in changed.out


def test_a_row_that_fails_is_told_and_the_others_go_on(experiment: Path, tmp_path: Path) -> None:
    text = EXPERIMENT.replace("seeds: 2", "seeds: 1").replace("epochs: 20", "epochs: 4")
    text = text.replace("name: large,", "name: large, config: {execution: {device: cuda}},")
    text = text.replace("name: large again,", "name: diverges, config: {schedule: {reference_lr: 1.0e+6}},")
    experiment.write_text(text)
    asked = arguments(experiment, tmp_path / "out")
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "largebatch", "reproduce", "run", *asked]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: large, seed 0: execution.device: 'cuda', but torch sees no GPU here" in done.stdout
    assert "2 of 3 runs are done" in done.stdout

    status = call("reproduce", "status", *asked)
    assert status.status == 0
    lines = {line.split("  ")[1].strip(): line for line in status.out.splitlines() if line.startswith("  ")}
    assert "100 %  1 finished" in lines["small"]
    assert "1 failed" in lines["large"]
    assert "1 diverged" in lines["diverges"]

    table = report(experiment, tmp_path / "out", tmp_path / "into")["small.md"].decode()
    assert "| large | 64 | 0.1 | 1 failed |" in table
    assert "1 diverged" in table


def test_the_readme_gets_a_block_and_nothing_else(experiment: Path, tmp_path: Path) -> None:
    experiment.write_text(EXPERIMENT.replace("seeds: 2", "seeds: 1").replace("epochs: 20", "epochs: 4"))
    asked = arguments(experiment, tmp_path / "out")
    assert call("reproduce", "run", *asked).status == 0
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- reproduce:begin -->\nold\n<!-- reproduce:end -->\nafter\n")
    into = ["--into", str(tmp_path / "into"), "--readme", str(readme)]
    assert call("reproduce", "report", *asked, *into).status == 0
    first = readme.read_text()
    assert first.startswith("before\n<!-- reproduce:begin -->\n**Small** (Nowhere), scale `smoke`:\n\n| row |")
    assert first.endswith("\n<!-- reproduce:end -->\nafter\n")
    assert "\nold\n" not in first
    assert "- *large*: cannot tell, since *small*" in first  # no seed learns that much in so few steps
    assert call("reproduce", "report", *asked, *into).status == 0
    assert readme.read_text() == first

    # The same from the report's own JSON, without the runs; the recorded command has the path of an own experiment.
    files = report(experiment, tmp_path / "out", tmp_path / "into")
    (tmp_path / "into/smoke/small_size.png").unlink()
    nowhere = arguments(experiment, tmp_path / "nowhere")
    assert call("reproduce", "report", *nowhere, *into, "--from-json").status == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "into/smoke").iterdir()} == files
    assert f"`largebatch reproduce run {experiment} --scale smoke`" in files["small.md"].decode()
    assert json.loads(files["small.json"])["trained"]["data"] == "digits"
    empty = call("reproduce", "report", *nowhere, "--into", tmp_path / "empty", "--from-json")
    assert (empty.status, empty.err.count("\n")) == (2, 1)
    assert "small.json is not the JSON of a report" in empty.err

    readme.write_text("no markers\n")
    failed = call("reproduce", "report", *asked, *into)
    assert failed.status == 2
    assert "has no lines <!-- reproduce:begin -->" in failed.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("reference: small", "reference: tiny"), "there is no row 'tiny'"),
        (("virtual_workers: 2}", "virtual_workerz: 2}"), "row 'small' at scale smoke"),
        (("smoke.yaml", "smokes.yaml"), "no such file"),
        (("name: large again", "name: large"), "['large'] are named twice"),
    ],
)
def test_a_mistake_in_an_experiment_is_told(
    experiment: Path, tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    experiment.write_text(EXPERIMENT.replace(*change))
    done = call("reproduce", "run", *arguments(experiment, tmp_path / "out"))
    assert done.status == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    missing = call("reproduce", "run", "warmupp", "--out", tmp_path)
    assert missing.status == 2
    assert "experiment 'warmupp': no such experiment; did you mean 'warmup'?" in missing.err
    scale = call("reproduce", "status", "warmup", "--scale", "huge")
    assert scale.status == 2
    assert "--scale: 'huge' is not one of smoke, cpu, gpu, paper" in scale.err
    nothing = call("reproduce", "report", ROOT / "configs/reproduce/warmup.yaml", "--out", tmp_path, "--into", tmp_path)
    assert nothing.status == 2
    assert "no run has finished yet" in nothing.err


def test_what_is_drawn_stays_within_what_can_be() -> None:
    assert _within(98.0, 5.0, "top1_error") == (93.0, 100.0)
    assert _within(98.0, 5.0, "train_loss") == (93.0, 103.0)
    assert _within(1.0, 5.0, "train/loss") == (0.0, 6.0)


def test_rows_that_share_a_place_in_a_sweep_are_all_drawn(tmp_path: Path) -> None:
    runs = [{"state": "finished"}, {"state": "diverged"}]
    row = {"line": "", "global_batch": 8, "peak_lr": 0.1, "paper": {"mean": 2.0, "std": None, "n": 5}, "runs": runs}
    rows = [{**row, "name": str(mean), "result": {"mean": mean, "std": 0.1, "n": 3}} for mean in (4.0, 3.0)]
    rows.append({**row, "name": "nothing yet", "result": None})
    result = {
        "experiment": "tie",
        "scale": "smoke",
        "settings": {"title": "$Tie_$", "measure": "top1_error", "reference": "4.0"},
        "plots": [{"name": kind, "kind": kind, "x": "peak_lr", "rows": []} for kind in ("sweep", "dots")],
        "rows": rows,
    }
    assert draw_plots(result, tmp_path, pytest.fail) == ["tie_sweep.png", "tie_dots.png"]
    assert (tmp_path / "tie_sweep.png").read_bytes().startswith(b"\x89PNG")
