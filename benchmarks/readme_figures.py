"""Writes the README's figures from the JSON files under results/; nothing in these blocks is typed by hand.

python benchmarks/readme_figures.py           # writes the blocks
python benchmarks/readme_figures.py --check   # exit status 1 if they are not what the files say
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largebatch.benchmark.tables import Table, as_markdown, breakdown_table, scaling_table, tune_table

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


def machine(environment: Mapping[str, Any]) -> str:
    cpu, packages = environment["cpu"], environment["packages"]
    return f"{cpu['model']}, {cpu['cores']} cores, torch {packages['torch']}, Python {environment['python']}"


def measured() -> str:
    table: Table = (["what", "measured"], [list(row) for row in rows()])
    where = machine(read("train/main_job.json")["environment"])
    return f"On {where}; files and commands under `results/`.\n\n{as_markdown(table)}\n"


def benchmark() -> str:
    folder = "results/benchmark/resnet20_cpu"
    found = read("benchmark/resnet20_cpu/benchmark.json")
    measurements = found["measurements"]
    rounds = len({window["round"] for window in measurements[0]["windows"]})
    head = (
        f"`torchrun --standalone --nproc-per-node=2 -m largebatch {found['command']}` on "
        f"{machine(found['environment'])}, gloo, one thread a rank; medians of {rounds} interleaved rounds ± half the "
        f"interquartile range ([{folder}]({folder}/benchmark.md))."
    )
    pictures = "\n".join(
        f"![{what}]({folder}/{name}.png)"
        for name, what in (("throughput", "Throughput against ideal"), ("breakdown", "Where the step goes"))
    )
    tables = [scaling_table(measurements), breakdown_table(measurements), tune_table(found["tune"])]
    return "\n\n".join([head, *map(as_markdown, tables), pictures, against_ddp()]) + "\n"


def against_ddp() -> str:
    head = ["reduction", "virtual workers a rank", "efficiency", "of plain DDP", "ratio"]
    cells = [
        [
            found["reduction"],
            str(found["workers_per_rank"]),
            f"{100 * found['efficiency_ours']:.1f} %",
            f"{100 * found['efficiency_plain']:.1f} %",
            "{:.3f} ({:.3f} to {:.3f})".format(found["ratio_of_efficiencies"], *found["interval"]),
        ]
        for found in read("benchmark/ddp_comparison.json")["found"]
    ]
    return (
        "Weak-scaling efficiency at N = 2 beside that of a DistributedDataParallel loop written by hand, same model "
        "and micro-batches, windows interleaved (`benchmarks/ddp_comparison.py`):\n\n" + as_markdown((head, cells))
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
