"""What dealing by measured speed and a deadline gain and cost: pairs of whole runs, without and with it in turn.

python benchmarks/stragglers.py [OUT.json [CASE...]]   (results/benchmark/stragglers.json; about half an hour)

Each run is the command `largebatch train` on ranks of this machine; what counts is the second half of its steps, when
`measured` has dealt and a deadline knows what is usual. In `busy_core`, two ranks have a core each, and a process that
never sleeps runs on the second. In the other cases slow ranks are sleeps (`execution.delays`, drawn alike in all runs)
beside a tiny model, so that few cores suffice. images/s counts images that arrived.
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
PAIRS = {"busy_core": 5, "one_of_four_slow": 3, "no_difference": 2, "rare_slow_steps": 2}
COMMON = ["schedule={warmup: {kind: none}, decay: {kind: none}}", "checkpoint.every_epochs=null"]
TINY = [*COMMON, "evaluation.every_epochs=1000", "model={name: mlp, hidden: [16]}"]
FOUR = [*TINY, "batch={virtual_workers: 32, images_per_worker: 4}", "logging.every_steps=2"]
MEASURED = "execution.deal=measured"
CASES: dict[str, tuple[int, list[str], str]] = {
    "busy_core": (
        2,
        [*COMMON, "batch={virtual_workers: 8, images_per_worker: 64}", "schedule.epochs=60", "logging.every_steps=5"],
        MEASURED,
    ),
    "one_of_four_slow": (
        4,
        [*FOUR, "schedule.epochs=2", "execution.delays={seconds: 0.1, slow_ranks: [3], slow_factor: 1.5}"],
        MEASURED,
    ),
    "no_difference": (
        2,
        [
            *TINY,
            "batch={virtual_workers: 8, images_per_worker: 16}",
            "schedule.epochs=46",
            "logging.every_steps=10",
            "execution.delays={seconds: 0.03}",
        ],
        MEASURED,
    ),
    # Each step has a slow rank as often as with 64 ranks of which each is slow in 1 % of its steps: 48 %.
    "rare_slow_steps": (
        4,
        [*FOUR, "schedule.epochs=6", "execution.delays={seconds: 0.1, rare_share: 0.15, rare_factor: 2.0}"],
        "batch.deadline.slack=0.3",
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


def train(case: str, remedy: list[str], folder: Path) -> dict[str, Any]:
    """One run; images/s of its second half, its changes of the deal, what it dropped, and its weights."""
    ranks, overrides, _ = CASES[case]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "largebatch", "train", "digits", "--run-dir", str(folder)]
    processes = []
    for rank in range(ranks):
        pin = ["taskset", "-c", str(rank)] if case == "busy_core" and ranks > 1 else []
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [*pin, *command, *overrides, *remedy],
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
        "dropped_workers": sum(r.get("dropped_workers", 0) for r in records),
        "model_sha256": hashlib.sha256((folder / "model.pt").read_bytes()).hexdigest(),
    }


def measure(case: str) -> dict[str, Any]:
    ranks, overrides, remedy = CASES[case]
    pairs = []
    with tempfile.TemporaryDirectory() as folder, busy(1) if case == "busy_core" else contextlib.nullcontext():
        for pair in range(PAIRS[case]):
            kinds = {"without": [], "with": [remedy]}
            order = list(kinds) if pair % 2 == 0 else [*reversed(kinds)]
            pairs.append({kind: train(case, kinds[kind], Path(folder) / f"{pair}_{kind}") for kind in order})
    ratios = [pair["with"]["images_per_second"] / pair["without"]["images_per_second"] for pair in pairs]
    runs = [run for pair in pairs for run in pair.values()]
    return {
        "ranks": ranks,
        "overrides": overrides,
        "remedy": remedy,
        "ratio_of_images_per_second": {"median": statistics.median(ratios), "all": ratios, "n": len(ratios)},
        "same_weights": len({run["model_sha256"] for run in runs}) == 1,
        "runs": pairs,
    }


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results/benchmark/stragglers.json"
    cases = json.loads(out.read_text())["cases"] if out.exists() else {}
    cases |= {case: measure(case) for case in sys.argv[2:] or CASES}
    write_json_atomically(out, {"environment": describe_environment(), "cases": cases})
    print(json.dumps({name: case["ratio_of_images_per_second"] for name, case in cases.items()}, indent=2))


if __name__ == "__main__":
    main()
