"""Before the process group exists: have all ranks joined, each once, and do they mean the same group?"""

from __future__ import annotations

import datetime
import os
import queue
import threading
import time
import uuid
from typing import NoReturn
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed.distributed_c10d import rendezvous

from largebatch.errors import UserError

_POLL_SECONDS = 0.05
_LINGER_SECONDS = 10.0
_OWN_MESSAGE_SECONDS = 5.0  # torch's own, where it has one, says more


def open_store(init_method: str, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The store that `init_method` describes; unlike torch's own call, rank 0 does not wait for the others in it."""
    host, port = None, None
    if init_method.startswith("tcp://"):
        address = urlsplit(init_method)
        host, port = address.hostname, address.port
    elif init_method == "env://" and not under_agent():
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    file = urlsplit(init_method) if init_method.startswith("file://") else None
    if file is not None and not os.path.isdir(os.path.dirname(file.path)):
        raise UserError(f"{init_method}: no such folder; name a file in a folder that all ranks can see")
    if host is None or port is None:
        store, _, _ = next(rendezvous(init_method, rank, world_size, timeout=timeout))
        return store
    return _tcp_store(host, port, rank, timeout)


def _tcp_store(host: str, port: int, rank: int, timeout: datetime.timedelta) -> dist.Store:
    """Raises UserError where what listens there is no store: torch would wait for its answer for ever."""
    outcome: queue.Queue[dist.Store | Exception] = queue.Queue()

    def make() -> None:
        try:
            outcome.put(
                dist.TCPStore(
                    host, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False, multi_tenant=True
                )
            )
        except Exception as error:  # handed to the thread that waits
            outcome.put(error)

    threading.Thread(target=make, name="store", daemon=True).start()
    try:
        made = outcome.get(timeout=timeout.total_seconds() + _OWN_MESSAGE_SECONDS)
    except queue.Empty:
        raise UserError(
            f"{host}:{port} did not answer as rank 0 would within {timeout.total_seconds() / 60:g} minutes "
            "(execution.timeout_minutes); if another program listens there, choose another MASTER_PORT"
        ) from None
    if isinstance(made, Exception):
        raise made
    return made


def under_agent() -> bool:
    """Whether torchrun's agent dealt the ranks, and keeps the store: then none can be missing or there twice."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def call_roll(store: dist.Store, *, rank: int, world_size: int, backend: str, timeout: datetime.timedelta) -> None:
    """Return when all ranks are here. Raises UserError, on every rank that is, if they do not fit together.

    torch itself would wait for its whole timeout in each of these cases, or for ever.
    """
    own = f"WORLD_SIZE={world_size}, backend {backend}"
    store.add("arrived", 1)
    if store.add(f"rank/{rank}", 1) > 1:
        _object(
            store,
            rank,
            f"two processes claim to be rank {rank} of {world_size}; give each its own RANK (torchrun and srun "
            "do), and let no process of an earlier start, nor its rendezvous file, be there any more",
        )
    theirs = store.compare_set("group", "", own).decode()
    if theirs != own:
        _object(
            store,
            rank,
            f"rank {rank} was started with {own}, another rank with {theirs}; start all of them in the same way",
        )
    deadline = time.monotonic() + timeout.total_seconds()
    here = store.add("here", 1)
    while here < world_size:
        if store.check(["objection"]):
            _leave(store, rank, store.get("objection").decode())
        if time.monotonic() > deadline:
            raise _missing(store, "rank", range(world_size), timeout)
        time.sleep(_POLL_SECONDS)
        here = store.add("here", 0)


def name_attempt(store: dist.Store, *, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """A name that only the ranks of this very start share. Raises UserError or RuntimeError if they do not come.

    After a restart, torchrun's store still holds what the ranks before left there: gloo would connect to their
    addresses.
    """
    if rank == 0:
        name = f"{world_size}-{uuid.uuid4().hex}"
        store.set("attempt", name)
        try:
            store.wait([f"{name}/{other}" for other in range(1, world_size)], timeout)
        except dist.DistStoreError as error:
            raise _missing(store, name, range(1, world_size), timeout) from error
        store.set(f"{name}/go", "")
        return name
    deadline = time.monotonic() + timeout.total_seconds()
    seen, is_new = "", False
    while time.monotonic() < deadline:
        name = store.get("attempt").decode() if store.check(["attempt"]) else seen
        if name != seen:
            # An earlier start's had another size, or this rank of it has answered before.
            is_new = name.startswith(f"{world_size}-") and store.add(f"{name}/{rank}", 1) == 1
            seen = name
        if is_new and store.check([f"{name}/go"]):
            return name
        time.sleep(_POLL_SECONDS)
    raise UserError(f"not all of the {world_size} ranks joined within {timeout.total_seconds() / 60:g} minutes")


def _missing(store: dist.Store, prefix: str, ranks: range, timeout: datetime.timedelta) -> UserError:
    """The error that names those of `ranks` that have left nothing in the store."""
    missing = [str(rank) for rank in ranks if not store.check([f"{prefix}/{rank}"])]
    return UserError(
        f"rank {', '.join(missing)} of {ranks.stop} did not join within {timeout.total_seconds() / 60:g} minutes "
        "(execution.timeout_minutes); check that process's output, and whether it can reach this host"
    )


def _object(store: dist.Store, rank: int, text: str) -> NoReturn:
    store.set("objection", text)
    _leave(store, rank, text)


def _leave(store: dist.Store, rank: int, text: str) -> NoReturn:
    """Raise UserError; rank 0, whose process may hold the store, gives the others the time to read it there."""
    store.add("heard", 1)
    deadline = time.monotonic() + _LINGER_SECONDS
    while rank == 0 and time.monotonic() < deadline and store.add("heard", 0) < store.add("arrived", 0):
        time.sleep(_POLL_SECONDS)
    raise UserError(text)
