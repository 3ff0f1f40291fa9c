"""Ranks that hang: one rank waits at a gate in the model or the data set, or a signal stops it."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from survive import Fleet
from torch import Tensor, nn

from largebatch.distributed.environment import RENDEZVOUS

_IMAGES, _CALLS = 64, 12
_CONFIG = """
model: {name: "hangs:net", arguments: {gate: MODEL_GATE}}
data: {name: "hangs:images", arguments: {gate: DATA_GATE}, image_size: 8, loader_processes: PROCESSES, prefetch: 1}
batch: {virtual_workers: 6, images_per_worker: 2}
schedule: {epochs: 4, reference_batch: 8, warmup: {kind: none}, decay: {kind: none}}
evaluation: {every_epochs: 4}
execution: {timeout_minutes: MINUTES}
"""


class Gate:
    """On one rank or all, the call with number `_CALLS` waits until a file exists; for ever, if nobody makes it."""

    def __init__(self, file: str, rank: int | None) -> None:
        self._file = file
        self._left = _CALLS if rank in (None, int(os.environ["RANK"])) else 0

    def go_through(self) -> None:
        self._left -= 1
        if self._left == 0:
            Path(f"{self._file}.reached").touch()
            while not Path(self._file).exists():
                time.sleep(0.01)


class Net(nn.Module):
    """A linear model with a gate in its forward."""

    def __init__(self, num_classes: int, gate: dict[str, Any] | None) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, num_classes)
        self._gate = Gate(**gate) if gate else None

    def forward(self, images: Tensor) -> Tensor:
        if self._gate is not None and self.training:
            self._gate.go_through()
        return self.head(images.flatten(1))


def net(num_classes: int = 2, gate: dict[str, Any] | None = None) -> nn.Module:
    return Net(num_classes, gate)


class Images:
    """Images of noise, with a gate before each."""

    classes = ("even", "odd")

    def __init__(self, images: int, gate: dict[str, Any] | None) -> None:
        self._images = images
        self._gate = Gate(**gate) if gate else None

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._gate is not None:
            self._gate.go_through()
        noise = torch.Generator().manual_seed(index)
        return torch.randint(256, (3, 8, 8), generator=noise, dtype=torch.uint8), index % 2


def images(gate: dict[str, Any] | None = None) -> tuple[Images, Images]:
    return Images(_IMAGES, gate), Images(8, None)


def by_file() -> Callable[[int], dict[str, str]]:
    return lambda _: {}


def by_port() -> Callable[[int], dict[str, str]]:
    """Variables with which rank 0 itself holds the store, as with srun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return lambda _: {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), RENDEZVOUS: "env://"}


class Hang(NamedTuple):
    """What the others said."""

    seconds: float
    """From the hang until all others had ended."""
    statuses: list[int]
    left: list[int]
    """The statuses that they wrote before they left."""
    messages: list[str]
    victim: str
    """What the rank that hung has printed."""


def _train(folder: Path, world_size: int, timeout: float, by: str, **gates: Any) -> Fleet:
    text = _CONFIG.replace("MINUTES", str(timeout / 60)).replace("PROCESSES", str(int("DATA_GATE" in gates)))
    for name in ("MODEL_GATE", "DATA_GATE"):
        text = text.replace(name, json.dumps(gates.get(name)))
    (folder / "config.yaml").write_text(text)
    rendezvous = by_port() if by == "port" else by_file()
    return Fleet(
        world_size,
        *("train", folder / "config.yaml", "--run-dir", folder / "run"),
        environ=lambda rank: {"LARGEBATCH_STATUS_FILE": str(folder / "status"), **rendezvous(rank)},
    )


def hang(kind: str, folder: Path, *, world_size: int, victim: int, by: str, timeout: float) -> Hang:
    """Train on `world_size` ranks, of which `victim` hangs.

    `kind` is forward (it never returns), loader (its loader process never returns), stopped (SIGSTOP in forward) or
    exchange (SIGSTOP while it waits for another rank); `by` is the rendezvous, file or port.
    """
    flag = folder / "gate"
    gate = {"file": str(flag), "rank": (victim + 1) % world_size if kind == "exchange" else victim}
    others = [rank for rank in range(world_size) if rank != victim]
    with _train(folder, world_size, timeout, by, **{"DATA_GATE" if kind == "loader" else "MODEL_GATE": gate}) as fleet:
        fleet.until(lambda: Path(f"{flag}.reached").exists())
        if kind in ("stopped", "exchange"):
            phase = "forward" if kind == "stopped" else kind
            fleet.until(lambda: _beat(fleet, victim)["phase"] == phase)
            fleet.send(signal.SIGSTOP, victim)
        started = time.monotonic()
        if kind == "exchange":
            flag.touch()
        outcomes = fleet.outcomes(timeout=timeout + 60.0, ranks=others)
        seconds = time.monotonic() - started
        if kind in ("forward", "loader"):
            fleet.outcomes(ranks=[victim])
        left = [int((folder / f"status.{rank}").read_text()) for rank in others]
        said = fleet.output(victim)
    flag.touch()  # a loader process that hangs outlives its rank
    return Hang(seconds, [o.status for o in outcomes], left, [o.err for o in outcomes], said)


def take_long(folder: Path, *, world_size: int, timeout: float) -> list[int]:
    """Train, with all ranks in one forward for longer than the timeout; their statuses."""
    flag = folder / "gate"
    with _train(folder, world_size, timeout, "file", MODEL_GATE={"file": str(flag), "rank": None}) as fleet:
        fleet.until(lambda: all(_beat(fleet, rank)["still"] > 1.2 * timeout for rank in range(world_size)))
        flag.touch()
        return [outcome.status for outcome in fleet.outcomes()]


def _beat(fleet: Fleet, rank: int) -> dict[str, Any]:
    """What a rank says of itself."""
    port = fleet.variables[rank].get("MASTER_PORT")
    if port:
        store: dist.Store = dist.TCPStore("127.0.0.1", int(port), is_master=False)
    else:
        store = dist.FileStore(f"{fleet.folder}/store", len(fleet.processes))
    key = f"group/beat/{rank}"
    return json.loads(store.get(key)) if store.check([key]) else {"phase": "", "still": 0.0}
