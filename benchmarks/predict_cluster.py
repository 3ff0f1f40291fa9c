"""Does the performance model predict what it has not seen? On hosts joined by links of a limited rate.

    sudo python benchmarks/predict_cluster.py --json results/benchmark/predict_cluster.json

Steps are measured on 2 and 3 hosts at two rates (100 and 400 Mbit/s). The model is fitted to these, and predicts
the step on 4 hosts at a third rate, 200 Mbit/s: neither that number of hosts nor that rate was seen. Then it is
measured. The hosts are network namespaces of this machine (benchmarks/cluster.sh), which share its cores, so the
model's gradients outweigh its compute. Exit status 1 if the prediction is off by more than `--limit`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from largebatch.benchmark.fit import fit
from largebatch.benchmark.options import Options, parse_rate
from largebatch.benchmark.performance import Layout, predict

ROOT = Path(__file__).parents[1]
SEEN_RATES, UNSEEN_RATE = ("100mbit", "400mbit"), "200mbit"
# What a fit takes, kept so that another model can be fitted to the same measurements.
FITTED = (
    "mode", "world_size", "step", "other", "data_wait", "compute_by_rank", "compute_steps_by_rank", "buckets",
    "replay_seconds",
)  # fmt: skip
ENVIRONMENT = ("platform", "python", "packages", "cpu", "memory", "threads", "git")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("benchmark/mlp_network"))
    parser.add_argument("--reduction", action="append", choices=("reproducible", "fast"), help="default: both")
    parser.add_argument("--seen-hosts", default="2,3", help="the model is fitted to these (default: %(default)s)")
    parser.add_argument("--unseen-hosts", type=int, default=4, help="and predicts these (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=0.10, help="largest relative error")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--rank", nargs=4, metavar=("COUNTS", "RATE", "REDUCTION", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(arguments.config, arguments.rounds, *arguments.rank)
        return
    results = [check(arguments, reduction) for reduction in arguments.reduction or ("reproducible", "fast")]
    for result in results:
        print(
            f"{result['reduction']}: {arguments.unseen_hosts} hosts at {UNSEEN_RATE}: predicted "
            f"{1000 * result['predicted']['step']:.1f} ms, measured {1000 * result['measured']['step']:.1f} ms, error "
            f"{100 * result['error']:+.1f} %; leave-one-out {percent(result['leave_one_out_error'])}"
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    sys.exit(any(abs(result["error"]) > arguments.limit for result in results))


def percent(error: float | None) -> str:
    return "unknown" if error is None else f"{100 * error:.1f} %"


def run_rank(config: Path, rounds: int, counts: str, rate: str, reduction: str, folder: str) -> None:
    """One rank of a benchmark, on its host."""
    from largebatch.benchmark.command import benchmark
    from largebatch.config import Config
    from largebatch.configfile.loading import load_config
    from largebatch.distributed.environment import read_launch

    options = Options(
        ranks=tuple(int(count) for count in counts.split(",")),
        workers_per_rank=1,
        rounds=rounds,
        window_seconds=0.2,
        largest_allreduce=4 << 20,
        measured_network=parse_rate(rate, "--measured-network"),
    )
    loaded = load_config(config, [f"execution.reduction={reduction}"], Config)
    benchmark(loaded, options, read_launch(), Path(folder), command=f"benchmark {config.name}")


def check(arguments: argparse.Namespace, reduction: str) -> dict[str, Any]:
    """Fit to what is seen, predict and measure what is not."""
    hosts = tuple(int(count) for count in arguments.seen_hosts.split(","))
    seen = [measure(arguments, reduction, rate, hosts) for rate in SEEN_RATES]
    made = fit(seen)
    layout = Layout(arguments.unseen_hosts, 1)
    rate = parse_rate(UNSEEN_RATE, "rate")
    predicted = predict(made.parameters, made.sent, layout, algorithm=made.algorithm, rate=rate)
    unseen = measure(arguments, reduction, UNSEEN_RATE, (arguments.unseen_hosts,))
    (measured,) = unseen["measurements"]
    return {
        "reduction": reduction,
        "algorithm": made.algorithm,
        "parameters": made.parameters.as_dict(),
        "leave_one_out": made.errors,
        "leave_one_out_error": made.error,
        "predicted": asdict(predicted),
        "measured": {name: measured[name] for name in ("step", "compute", "exposed_communication", "other", "spread")},
        "error": predicted.step / measured["step"] - 1,
        "seen": [
            {
                "rate": rate,
                "steps": {m["world_size"]: m["step"] for m in result["measurements"]},
                "measurements": [{k: m[k] for k in FITTED} for m in result["measurements"]],
                "ranks_per_node": result["ranks_per_node"],
                "measured_network": result["measured_network"],
                "allreduce": [
                    {k: a[k] for k in ("world_size", "reduction", "size", "seconds")} for a in result["allreduce"]
                ],
            }
            for rate, result in zip(SEEN_RATES, seen, strict=True)
        ],
        "environment": {name: unseen["environment"][name] for name in ENVIRONMENT},
        "config": unseen["config"],
    }


def measure(arguments: argparse.Namespace, reduction: str, rate: str, counts: tuple[int, ...]) -> dict[str, Any]:
    """`benchmark.json` of this many hosts joined by links of `rate`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(ROOT / "benchmarks/cluster.sh"), str(max(counts)), rate, sys.executable, __file__,
            "--config", str(arguments.config), "--rounds", str(arguments.rounds),
            "--rank", ",".join(map(str, counts)), rate, reduction, folder,
        ]  # fmt: skip
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads((Path(folder) / "benchmark.json").read_text())
        return found


if __name__ == "__main__":
    main()
