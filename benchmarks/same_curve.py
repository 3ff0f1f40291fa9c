"""The README's picture: one config on 1, 2 and 3 ranks and after a kill, and the throughput on more ranks.

python benchmarks/same_curve.py          # trains four times (some minutes), writes results/train/same_curve.*
python benchmarks/same_curve.py --draw   # draws the picture again from the JSON files
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the same parts as the tests': ranks that can be killed

from survive import Fleet, newest_step  # noqa: E402

from largebatch.report.environment import describe_environment  # noqa: E402
from largebatch.report.figure import draw, panels  # noqa: E402
from largebatch.report.files import write_json_atomically  # noqa: E402
from largebatch.report.metrics import read_metrics  # noqa: E402

CONFIG = ["digits", "checkpoint.every_steps=20", "logging.every_steps=6"]
KILLED_AFTER = 80  # a checkpoint of this step or later is on the disk when the ranks are killed
JSON = ROOT / "results/train/same_curve.json"
BENCHMARK = ROOT / "results/benchmark/resnet20_cpu/benchmark.json"


def train(run_dir: Path, world_size: int) -> None:
    with Fleet(world_size, "train", *CONFIG, "--run-dir", run_dir) as fleet:
        assert [outcome.status for outcome in fleet.outcomes(timeout=600)] == [0] * world_size


def kill(run_dir: Path, world_size: int) -> int:
    """SIGKILL to all ranks on the way; the step of the newest checkpoint."""
    with Fleet(world_size, "train", *CONFIG, "--run-dir", run_dir) as fleet:
        fleet.until(lambda: newest_step(run_dir) >= KILLED_AFTER, timeout=600)
        fleet.send(signal.SIGKILL)
        fleet.outcomes()
    return int(newest_step(run_dir))


def curve(run_dir: Path) -> dict[str, Any]:
    records = [record for record in read_metrics(run_dir) if "train/loss" in record]
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "step": [record["step"] for record in records],
        "train/loss": [record["train/loss"] for record in records],
        "weights_sha256": summary["weights_sha256"],
        "top1_error": summary["top1_error"],
    }


def measure() -> None:
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, 2, 3):
            run_dir = Path(folder) / str(world_size)
            train(run_dir, world_size)
            runs[f"{world_size} rank{'s' if world_size > 1 else ''}"] = curve(run_dir)
        run_dir = Path(folder) / "killed"
        step = kill(run_dir, 2)
        train(run_dir, 3)
        runs[f"2 ranks, killed, resumed on 3 from step {step}"] = curve(run_dir)
    write_json_atomically(JSON, {"config": CONFIG, "runs": runs, "environment": describe_environment()})


def figure() -> Any:
    runs = json.loads(JSON.read_text())["runs"]
    measurements = json.loads(BENCHMARK.read_text())["measurements"]
    image, (left, right) = panels(1, 2, size=(4.6, 3.2))
    for width, (name, run) in zip((9, 6, 3, 1), runs.items(), strict=True):
        left.plot(run["step"], run["train/loss"], linewidth=width, label=name, alpha=1 if width == 1 else 0.6)
    hashes = {run["weights_sha256"][:12] for run in runs.values()}
    left.set(xlabel="step", ylabel="training loss", title=f"One curve. SHA-256 of model.pt: {', '.join(hashes)}…")
    left.legend(fontsize="small")
    points = sorted({m["world_size"]: m["images_per_second"] for m in measurements if m["mode"] == "weak"}.items())
    ranks, rates = zip(*points, strict=True)
    right.plot(ranks, [rates[0] * n for n in ranks], "--", color="gray", label="ideal")
    right.plot(ranks, rates, "o-", label="measured, ResNet-20, two cores")
    right.set(xlabel="ranks", ylabel="images/s", title="Throughput, 32 images per rank", xticks=ranks, ylim=(0, None))
    right.legend(fontsize="small")
    for axis in (left, right):
        axis.title.set_fontsize("small")
    return image


def main() -> None:
    if "--draw" not in sys.argv:
        measure()
    draw(JSON.with_suffix(".png"), figure, lambda text: sys.exit(text))


if __name__ == "__main__":
    main()
