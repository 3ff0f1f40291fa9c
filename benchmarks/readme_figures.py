"""Writes the README's figures from the JSON files under results/; nothing in these blocks is typed by hand.

python benchmarks/readme_figures.py           # writes the blocks
python benchmarks/readme_figures.py --check   # exit status 1 if they are not what the files say
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

ROOT = Path(__file__).parents[1]


def read(name: str) -> Any:
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def ratio(name: str) -> str:
    found = read(name)["ratio_of_images_per_second"]
    low, high = found["quartiles"]
    return f"{found['median']:.3f} (quartiles {low:.3f} to {high:.3f}, n = {found['n']} pairs)"


def jpeg() -> str:
    found = read("train/jpeg.json")
    loader, whole = (found[name]["ratio_to_reference"] for name in ("loader", "whole"))
    return (
        f"{loader:.2f} x in a loader process, {whole:.2f} x with normalising there too (n = {found['rounds']} rounds)"
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
        ("images/s of the training step over a bare PyTorch loop's, one rank", ratio("train/loop_n1.json")),
        ("images/s of `reproducible` over `fast`, two ranks, k = 16", ratio("train/loop_n2.json")),
        (
            "images/s of steps that each measure the gradient noise scale over steps that do not, k = 16",
            ratio("train/noise_scale.json"),
        ),
        ("images/s of the JPEG path over torchvision's reference transform, one core", jpeg()),
    ]


def measured() -> str:
    table: Table = (["what", "measured"], [list(row) for row in rows()])
    where = machine_text(read("train/main_job.json")["environment"])
    return f"On {where}; files and commands under `results/`.\n\n{as_markdown(table)}\n"


def benchmark() -> str:
    folder = "results/benchmark/resnet20_cpu"
    found = read("benchmark/resnet20_cpu/benchmark.json")
    measurements = found["measurements"]
    rounds = len({window["round"] for window in measurements[0]["windows"]})
    head = (
        f"`torchrun --standalone --nproc-per-node=2 -m largebatch {found['command']}` on "
        f"{machine_text(found['environment'])}, gloo, one thread a rank; medians of {rounds} interleaved rounds ± half "
        f"the interquartile range ([{folder}]({folder}/benchmark.md))."
    )
    pictures = "\n".join(
        f"![{what}]({folder}/{name}.png)"
        for name, what in (
            ("throughput", "Throughput against ideal"),
            ("step_time", "Time of a step over the minibatch"),
            ("breakdown", "Where the step goes"),
        )
    )
    tables = [scaling_table(measurements), breakdown_table(measurements), tune_table(found["tune"])]
    rule = f"How it was decided: {tune_rule(found['tune'])}."
    return "\n\n".join([head, *map(as_markdown, tables), rule, pictures, *predictions(), against_ddp()]) + "\n"


def predictions() -> list[str]:
    """Those that were made, each with a link to what it assumes."""
    folders = sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("results/benchmark/*/prediction.png"))
    return [
        f"![Efficiency on more ranks, as predicted]({folder}/prediction.png)\n"
        f"Efficiency on more ranks, as predicted; what is assumed for it is in [{folder}]({folder}/benchmark.md)."
        for folder in folders
    ]


def against_ddp() -> str:
    head = [
        "reduction",
        "virtual workers a rank",
        "images/s over plain DDP's, N = 1",
        "the same, N = 2",
        "weak-scaling efficiency over plain DDP's",
    ]
    comparisons = read("benchmark/ddp_comparison.json")["found"]
    cells = [
        [
            found["reduction"],
            str(found["workers_per_rank"]),
            f"{found['speed_over_plain']['1']:.3f}",
            f"{found['speed_over_plain']['2']:.3f}",
            "{:.3f} ({:.3f} to {:.3f})".format(found["ratio_of_efficiencies"], *found["interval"]),
        ]
        for found in comparisons
    ]
    lower = [found for found in comparisons if found["reduction"] == "fast" and found["ratio_of_efficiencies"] < 0.99]
    why = (
        " `fast` is below 0.99 since our step has one more all-reduce than plain DDP's, for the sums of loss, errors "
        "and BatchNorm statistics; `reproducible` has it too, but needs half of the messages at N = 2."
    )
    return (
        "Beside a DistributedDataParallel loop written by hand, same model and micro-batches, windows interleaved "
        f"(`benchmarks/ddp_comparison.py`):\n\n{as_markdown((head, cells))}\n\n"
        "The last column is the N = 2 column over the N = 1 column (in brackets where 95 % of it lie, by bootstrap): "
        "the ratio of the two programs' efficiencies, whose own values belong to the table above, since here windows "
        "of four programs take turns on the same caches and slow one another down." + (why if lower else "")
    )


BLOCKS = {"measured": measured, "benchmark": benchmark}


def main() -> None:
    path = ROOT / "README.md"
    text = written = path.read_text(encoding="utf-8")
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
        before, rest = written.split(begin)
        written = before + begin + block() + end + rest.split(end)[1]
    if "--check" in sys.argv:
        sys.exit(written != text)
    path.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
