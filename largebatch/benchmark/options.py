"""What the `benchmark` command was asked for. Free of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from largebatch.errors import UserError

MODES = ("weak", "strong", "both")
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(k|m|g|t)?bit(?:/s|ps)?", re.IGNORECASE)
_BITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Options:
    """One benchmark. Rates are in bytes a second."""

    ranks: tuple[int, ...]
    """Every N to measure, rising."""
    mode: str = "weak"
    workers_per_rank: int | None = None
    """Virtual workers of each rank in weak scaling; None: those of the config at the largest N."""
    rounds: int = 7
    """How often every kind of window is measured."""
    window_seconds: float = 0.4
    """Minimum length of a window."""
    largest_allreduce: int = 64 << 20
    """Bytes of the largest all-reduce that is measured by itself."""
    tune: bool = False
    predict: tuple[int, ...] = ()
    network: float | None = None
    """Nominal rate between the nodes that are predicted."""
    measured_network: float | None = None
    """Nominal rate between the nodes that are measured."""
    ranks_per_node: int | None = None
    """Ranks on a predicted node; None: as measured."""


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """``1,2,4`` as rising numbers without repetition. Raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{option}: {text!r} is not a list of whole numbers from 1, such as 1,2,4")
    return tuple(sorted({int(part) for part in parts}))


def parse_rate(text: str, option: str) -> float:
    """``50gbit`` as bytes a second. Raises UserError."""
    match = _RATE.fullmatch(text.strip())
    if not match or float(match.group(1)) == 0:
        raise UserError(f"{option}: {text!r} is not a rate in bits a second, such as 50gbit or 200mbit")
    return float(match.group(1)) * _BITS[(match.group(2) or "").lower()] / 8


def default_counts(world_size: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the whole launch."""
    powers = {1 << exponent for exponent in range(world_size.bit_length())}
    return tuple(sorted(power for power in powers | {world_size} if power <= world_size))


def check_world(options: Options, world_size: int, command: str) -> None:
    """Raise UserError if the launch has fewer ranks than the largest N; `command` is what was typed."""
    largest = options.ranks[-1]
    if largest <= world_size:
        return
    if world_size == 1:
        raise UserError(
            f"--ranks: {largest} ranks need a launcher that starts them; type\n"
            f"  torchrun --standalone --nproc-per-node={largest} -m largebatch {command}"
        )
    raise UserError(
        f"--ranks: {largest} is more than the {world_size} ranks of this launch; leave out what is above "
        f"{world_size}, or start {largest} ranks"
    )
