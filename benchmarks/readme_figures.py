"""Writes the tables of docs/results.md from the JSON files under results/; nothing in these blocks is typed by hand.

python benchmarks/readme_figures.py           # writes the blocks
python benchmarks/readme_figures.py --check   # exit status 1 if they differ from what the files say
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from largebatch.benchmark.tables import (
    Table,
    as_markdown,
    breakdown_table,
    machine_text,
    scaling_table,
    tune_rule,
    tune_table,
)
from largebatch.reproduce.tables import readme_block

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/results.md"
RESULTS = "../results"  # as the page sees it


def read(name: str) -> Any:
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def ratio(name: str) -> str:
    found = read(name)["ratio_of_images_per_second"]
    low, high = found["quartiles"]
    return f"{found['median']:.3f} (quartiles {low:.3f} to {high:.3f}, n = {found['n']} pairs)"


def measured_at(found: dict[str, Any]) -> str:
    """Precision and commit of a measurement, so that one older than the code can be recognised."""
    return f"{found['config']['execution']['precision']}, commit {found['environment']['git']['commit'][:9]}"


def jpeg() -> str:
    found = read("train/jpeg.json")
    loader, whole = (found[name]["ratio_to_reference"] for name in ("loader", "whole"))
    return (
        f"{loader:.2f} x in a loader process, {whole:.2f} x with normalising there too (n = {found['rounds']} rounds)"
    )


def sent() -> str:
    rows = read("benchmark/host_bytes.json")["rows"]
    ratios, hosts = (
        ", ".join(column) for column in zip(*((f"{r['ratio']:.4f}", r["hosts"]) for r in rows), strict=True)
    )
    return (
        f"{ratios} on {hosts} (hosts x ranks on each); {rows[0]['ratio_first']:.2f} in the first "
        f"{rows[0]['first_steps']} steps"
    )


def rows() -> list[tuple[str, str]]:
    main_job = read("train/main_job.json")
    summary = main_job["summary"]
    return [
        (
            f"`make train`: ResNet-8 on Fashion-MNIST, minibatch {summary['global_batch']}, "
            f"{summary['world_size']} ranks",
            f"top-1 error {summary['top1_error']:.2f} % in {summary['seconds']:.0f} s "
            f"({summary['images_per_second']:.0f} images/s)",
        ),
        ("images/s of the training step relative to a bare PyTorch loop, one rank", ratio("train/loop_n1.json")),
        ("images/s of `reproducible` relative to `fast`, two ranks, k = 16", ratio("train/loop_n2.json")),
        (
            "images/s of steps that measure the gradient noise scale relative to steps that do not, k = 16",
            ratio("train/noise_scale.json"),
        ),
        ("bytes that a host sends in a step, `reproducible` relative to `fast`, counted at its interface", sent()),
        ("images/s of the JPEG path relative to torchvision's reference transform, one core", jpeg()),
    ]


def measured() -> str:
    table: Table = (["what", "measured"], [list(row) for row in rows()])
    where = machine_text(read("train/main_job.json")["environment"])
    return f"On {where}; files and commands are under `results/`.\n\n{as_markdown(table)}\n"


def benchmark() -> str:
    folder = f"{RESULTS}/benchmark/resnet20_cpu"
    found = read("benchmark/resnet20_cpu/benchmark.json")
    measurements = found["measurements"]
    rounds = len({window["round"] for window in measurements[0]["windows"]})
    head = (
        f"`torchrun --standalone --nproc-per-node=2 -m largebatch {found['command']}` on "
        f"{machine_text(found['environment'])}, gloo, one thread per rank, {measured_at(found)}; medians of "
        f"{rounds} interleaved rounds ± half the interquartile range ([report]({folder}/benchmark.md))."
    )
    plots = "\n".join(
        f"![{what}]({folder}/{name}.png)"
        for name, what in (
            ("throughput", "Throughput against ideal"),
            ("step_time", "Time of a step over the minibatch"),
            ("breakdown", "Where the step goes"),
        )
    )
    tables = [scaling_table(measurements), breakdown_table(measurements), tune_table(found["tune"])]
    rule = f"How it was decided: {tune_rule(found['tune'])}."
    return "\n\n".join([head, *map(as_markdown, tables), rule, plots, *predictions(), against_ddp()]) + "\n"


def predictions() -> list[str]:
    """The predictions that exist, each with a link to its assumptions."""
    folders = sorted(
        f"{RESULTS}/benchmark/{path.parent.name}" for path in ROOT.glob("results/benchmark/*/prediction.png")
    )
    return [
        f"![Predicted efficiency on more ranks]({folder}/prediction.png)\n"
        f"Predicted efficiency on more ranks; its assumptions are in the [report]({folder}/benchmark.md)."
        for folder in folders
    ]


def against_ddp() -> str:
    head = [
        "reduction",
        "virtual workers per rank",
        "images/s relative to plain DDP, N = 1",
        "the same, N = 2",
        "weak-scaling efficiency relative to plain DDP's",
    ]
    comparison = read("benchmark/ddp_comparison.json")
    cells = [
        [
            found["reduction"],
            str(found["workers_per_rank"]),
            f"{found['speed_over_plain']['1']:.3f}",
            f"{found['speed_over_plain']['2']:.3f}",
            "{:.3f} ({:.3f} to {:.3f})".format(found["ratio_of_efficiencies"], *found["interval"]),
        ]
        for found in comparison["found"]
    ]
    return (
        "Against a hand-written DistributedDataParallel loop with the same model and micro-batches, in interleaved "
        f"windows (`benchmarks/ddp_comparison.py`), {measured_at(comparison)}:\n\n{as_markdown((head, cells))}\n\n"
        "The last column is the N = 2 column over the N = 1 column, with its 95 % bootstrap interval: the ratio of the "
        "two programs' efficiencies. The efficiencies themselves are in the table above, since windows of four "
        "programs that take turns on the same caches slow one another down. Our step has one small all-reduce more "
        "than plain DDP's, for the sums of loss, errors and BatchNorm statistics."
    )


def reproduce() -> str:
    files = sorted((ROOT / "results/reproduce/cpu").glob("*.json"))
    return (
        readme_block([json.loads(file.read_text(encoding="utf-8")) for file in files], f"{RESULTS}/reproduce/cpu")
        + "\n"
    )


BLOCKS = {"measured": measured, "benchmark": benchmark, "reproduce": reproduce}


def main() -> None:
    text = written = PAGE.read_text(encoding="utf-8")
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
        before, rest = written.split(begin)
        written = before + begin + block() + end + rest.split(end)[1]
    if "--check" in sys.argv:
        sys.exit(written != text)
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
