"""What a host sends in a step: the exact sum against the backend's plain one, counted at the network interface.

    sudo python benchmarks/host_bytes.py --json results/benchmark/host_bytes.json

Hosts are network namespaces of this machine (benchmarks/cluster.sh), each with one interface and one or more ranks.
24 virtual workers of 2 images train a ResNet-20; the bytes are those that left each host's interface, with all
headers. The first steps, in which the exact sum adds int64, are counted by themselves. Exit status 1 if a later step
of the exact sum sends more than `--limit` times the plain one's bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from largebatch.distributed.environment import connect, read_launch
from largebatch.distributed.exact import WIDE_STEPS
from largebatch.models.small_resnet import SmallResNet
from largebatch.report.environment import describe_environment
from largebatch.training.virtual_workers import VirtualWorkers

ROOT = Path(__file__).parents[1]
WORKERS, IMAGES = 24, 2
ENVIRONMENT = ("platform", "python", "packages", "cpu", "memory", "git")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="2x1,2x2,3x2", help="hosts x ranks on each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="counted steps (default: %(default)s)")
    parser.add_argument("--width", type=int, default=36, help="of the ResNet-20 (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1.02)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--rank", nargs=2, metavar=("REDUCTION", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(arguments.width, arguments.steps, *arguments.rank)
        return
    rows = [compare(arguments, hosts) for hosts in arguments.hosts.split(",")]
    for row in rows:
        kib = {name: f"{row[name]['later'] / 1024:,.0f}" for name in ("fast", "reproducible")}
        print(
            f"{row['hosts']}: KiB per host and step: fast {kib['fast']}, reproducible {kib['reproducible']} "
            f"({row['ratio']:.4f}; {row['ratio_first']:.2f} in the first {WIDE_STEPS} steps)"
        )
    if arguments.json:
        environment = describe_environment()
        result = {
            "rows": rows,
            "command": "benchmarks/host_bytes.py",
            "virtual_workers": WORKERS,
            "images_per_worker": IMAGES,
            "steps": arguments.steps,
            "gradient_bytes": 4 * sum(p.numel() for p in make_model(arguments.width).parameters()),
            "environment": {name: environment[name] for name in ENVIRONMENT},
        }
        arguments.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    sys.exit(any(row["ratio"] > arguments.limit for row in rows))


def compare(arguments: argparse.Namespace, hosts: str) -> dict[str, Any]:
    """Bytes a step of both reductions on `hosts`: the mean over the hosts, the median over the steps."""
    row: dict[str, Any] = {"hosts": hosts, "first_steps": WIDE_STEPS}
    for reduction in ("fast", "reproducible"):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                str(ROOT / "benchmarks/cluster.sh"), hosts, "10gbit", sys.executable, __file__,
                "--steps", str(arguments.steps), "--width", str(arguments.width), "--rank", reduction, folder,
            ]  # fmt: skip
            subprocess.run(command, check=True, timeout=3600)
            by_host = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        by_step = [statistics.mean(step) for step in zip(*by_host, strict=True)]
        first, later = by_step[1:WIDE_STEPS], by_step[WIDE_STEPS:]  # step 0 has what DDP agrees on
        row[reduction] = {
            "first": statistics.median(first), "later": statistics.median(later),
            "least": min(later), "most": max(later),
        }  # fmt: skip
    row["ratio"] = row["reproducible"]["later"] / row["fast"]["later"]
    row["ratio_first"] = row["reproducible"]["first"] / row["fast"]["first"]
    return row


def make_model(width: int) -> SmallResNet:
    torch.manual_seed(0)
    return SmallResNet(3, channels=1, classes=10, width=width)


def run_rank(width: int, steps: int, reduction: str, folder: str) -> None:
    """One rank's training; the first of each host writes what its interface has sent in each step."""
    with connect(read_launch(), device="cpu") as ranks:
        virtual = VirtualWorkers(make_model(width), ranks, virtual_workers=WORKERS, reduction=reduction)
        optimizer = torch.optim.SGD(virtual.model.parameters(), lr=0.01)
        images, labels = torch.randn(IMAGES, 1, 28, 28), torch.arange(IMAGES)
        sent = [bytes_sent()]
        for step in range(WIDE_STEPS + steps):
            with virtual.step(step) as passes:
                for _ in passes:
                    virtual.backward(F.cross_entropy(virtual(images), labels))
            optimizer.step()
            dist.barrier()
            sent.append(bytes_sent())
            dist.barrier()
        if os.environ["LOCAL_RANK"] == "0":
            steps_sent = [after - before for before, after in itertools.pairwise(sent)]
            (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(steps_sent))


def bytes_sent() -> int:
    """Bytes that have left this host's eth0; its column of /proc/net/dev, which is that of the namespace."""
    (line,) = re.findall(r"^\s*eth0:(.*)$", Path("/proc/net/dev").read_text(), re.MULTILINE)
    return int(line.split()[8])


if __name__ == "__main__":
    main()
