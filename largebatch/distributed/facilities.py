"""What this machine's torch.distributed can do, without starting anything that lasts."""

from __future__ import annotations

import datetime

import torch.distributed as dist


def available_backends() -> list[str]:
    """The backends that this torch was built with: of ``gloo`` and ``nccl``."""
    there = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return [name for name, available in there.items() if available]


def try_rendezvous(host: str) -> int:
    """Meet oneself at `host`, on a port that the system chooses; returns it. Raises RuntimeError."""
    store = dist.TCPStore(
        host, 0, world_size=1, is_master=True, timeout=datetime.timedelta(seconds=5), wait_for_workers=False
    )
    store.set("here", "yes")
    if store.get("here") != b"yes":
        raise RuntimeError("the store returned another value than was stored")
    return store.port
