"""What dealing by measured speed gains and costs: pairs of whole runs, `execution.deal: equal` and `measured` in turn.

python benchmarks/dealing.py [OUT.json [CASE...]]   (results/benchmark/dealing.json; about a quarter of an hour)

Each run is the command `largebatch train` on ranks of this machine; what counts is the second half of its steps, when
`measured` has dealt. In `busy_core`, two ranks have a core each, and a process that never sleeps runs on the second. In
the other cases slow ranks are sleeps (`execution.delays`) beside a tiny model, so that few cores suffice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from largebatch.report.environment import describe_environment
from largebatch.report.files import write_json_atomically

ROOT = Path(__file__).parents[1]
PAIRS = 3
COMMON = [
    "schedule={warmup: {kind: none}, decay: {kind: none}}",
    "checkpoint.every_epochs=null",
    "evaluation.every_epochs=1000",
    "logging.every_steps=5",
]
TINY = ["model={name: mlp, hidden: [16]}"]
CASES: dict[str, tuple[int, list[str]]] = {
    "busy_core": (2, ["batch={virtual_workers: 8, images_per_worker: 64}", "schedule.epochs=60"]),
    "one_of_four_slow": (
        4,
        [
            *TINY,
            "batch={virtual_workers: 32, images_per_worker: 4}",
            "schedule.epochs=8",
            "execution.delays={seconds: 0.02, slow_ranks: [3], slow_factor: 1.5}",
        ],
    ),
    "no_difference": (
        2,
        [
            *TINY,
            "batch={virtual_workers: 8, images_per_worker: 16}",
            "schedule.epochs=46",
            "execution.delays={seconds: 0.01}",
        ],
    ),
}


@contextlib.contextmanager
def busy(core: int) -> Iterator[None]:
    process = subprocess.Popen(["taskset", "-c", str(core), sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def train(case: str, deal: str, folder: Path) -> dict[str, Any]:
    """One run; images/s of its second half, its changes of the deal, and its weights."""
    ranks, overrides = CASES[case]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "largebatch", "train", str(ROOT / "configs/digits.yaml"), "--run-dir", str(folder)]
    processes = []
    for rank in range(ranks):
        pin = ["taskset", "-c", str(rank)] if case == "busy_core" and ranks > 1 else []
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [*pin, *command, *COMMON, *overrides, f"execution.deal={deal}"],
                env=os.environ | {key: str(value) for key, value in env.items()},
                stdout=subprocess.DEVNULL,
            )
        )
    assert [process.wait() for process in processes] == [0] * ranks
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steady = [r["images_per_second"] for r in records if r["step"] > records[-1]["step"] / 2]
    return {
        "images_per_second": statistics.harmonic_mean(steady),
        "steps": records[-1]["step"],
        "deals": [[int(r[k]) for k in r if k.startswith("deal/")] for r in records if "deal/rank_0" in r],
        "model_sha256": hashlib.sha256((folder / "model.pt").read_bytes()).hexdigest(),
    }


def measure(case: str) -> dict[str, Any]:
    pairs = []
    with tempfile.TemporaryDirectory() as folder, busy(1) if case == "busy_core" else contextlib.nullcontext():
        for pair in range(PAIRS):
            order = ("equal", "measured") if pair % 2 == 0 else ("measured", "equal")
            pairs.append({deal: train(case, deal, Path(folder) / f"{pair}_{deal}") for deal in order})
    ratios = [pair["measured"]["images_per_second"] / pair["equal"]["images_per_second"] for pair in pairs]
    runs = [run for pair in pairs for run in pair.values()]
    return {
        "ranks": CASES[case][0],
        "overrides": CASES[case][1],
        "ratio_of_images_per_second": {"median": statistics.median(ratios), "all": ratios, "n": len(ratios)},
        "most_changes_of_a_run": max(len(pair["measured"]["deals"]) for pair in pairs),
        "same_weights": len({run["model_sha256"] for run in runs}) == 1,
        "runs": pairs,
    }


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results/benchmark/dealing.json"
    cases = json.loads(out.read_text())["cases"] if out.exists() else {}
    cases |= {case: measure(case) for case in sys.argv[2:] or CASES}
    write_json_atomically(out, {"environment": describe_environment(), "cases": cases})
    print(json.dumps({name: case["ratio_of_images_per_second"] for name, case in cases.items()}, indent=2))


if __name__ == "__main__":
    main()
