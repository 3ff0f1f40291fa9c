"""Ranks that hang, 20 times in each of four ways, on three ranks over gloo: are they named by all others, and how soon?

python benchmarks/survive_hangs.py [TRIES] [OUT.json]      (20, results/survive/hangs.json; about half an hour)

Victims and rendezvous (a file, or a port at rank 0) take turns.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the same parts as the tests'

from hangs import hang  # noqa: E402

from largebatch.report.environment import describe_environment  # noqa: E402
from largebatch.report.files import write_json_atomically  # noqa: E402

KINDS = ("forward", "loader", "stopped", "exchange")
WORLD_SIZE = 3
TIMEOUT = 10.0


def one(kind: str, number: int) -> dict[str, Any]:
    """A run with one rank that hangs."""
    victim, by = number % WORLD_SIZE, ("file", "port")[number // WORLD_SIZE % 2]
    with tempfile.TemporaryDirectory() as folder:
        seen = hang(kind, Path(folder), world_size=WORLD_SIZE, victim=victim, by=by, timeout=TIMEOUT)
    named = [bool(re.search(rf"(^|\] )rank {victim} (hangs|died or hung)", message)) for message in seen.messages]
    return {
        "kind": kind,
        "victim": victim,
        "rendezvous": by,
        "named_by_all_others": all(named) and seen.statuses == seen.left == [1] * (WORLD_SIZE - 1),
        "seconds": round(seen.seconds, 2),
        "message": seen.messages[0].strip(),
    }


def _is_named(found: dict[str, Any]) -> bool:
    return found["named_by_all_others"] and found["seconds"] <= TIMEOUT + 10.0


def main() -> None:
    tries = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "results/survive/hangs.json"
    started = time.monotonic()
    found = []
    for number in range(tries):
        for kind in KINDS:
            found.append(one(kind, number))
            print(found[-1], flush=True)
    result = {
        "tries_each": tries,
        "timeout_seconds": TIMEOUT,
        "named": {kind: sum(_is_named(f) for f in found if f["kind"] == kind) for kind in KINDS},
        "most_seconds": {kind: max(f["seconds"] for f in found if f["kind"] == kind) for kind in KINDS},
        "seconds": round(time.monotonic() - started),
        "tries": found,
        "environment": describe_environment(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(out, result)
    print(result["named"], result["most_seconds"])
    sys.exit(set(result["named"].values()) != {tries})


if __name__ == "__main__":
    main()
