"""Writes the README's figures from the JSON files under results/; nothing in that block is typed by hand.

python benchmarks/readme_figures.py           # writes the block
python benchmarks/readme_figures.py --check   # exit status 1 if it is not what the files say
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured:begin -->\n", "<!-- measured:end -->\n"


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
        ("images/s of the JPEG path over torchvision's reference transform, one core", jpeg()),
    ]


def block() -> str:
    environment = read("train/main_job.json")["environment"]
    machine = (
        f"{environment['cpu']['model']}, {environment['cpu']['cores']} cores, torch "
        f"{environment['packages']['torch']}, Python {environment['python']}"
    )
    lines = [f"On {machine}; files and commands under `results/`.\n", "| what | measured |", "|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {value} |" for what, value in rows())]) + "\n"


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    written = before + BEGIN + block() + END + after
    if "--check" in sys.argv:
        sys.exit(written != text)
    path.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
