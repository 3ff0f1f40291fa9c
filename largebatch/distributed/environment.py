"""Which process am I: torchrun's variables, Slurm's, or one process alone; and the group that they make."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from largebatch.distributed.heartbeat import Heartbeat, Whereabouts
from largebatch.distributed.meeting import call_roll, name_attempt, open_store, under_agent
from largebatch.errors import UserError

T = TypeVar("T")

RENDEZVOUS = "LARGEBATCH_RENDEZVOUS"
"""Variable with an init method of torch.distributed (``file:///shared/path``) for use without a port."""
_BACKEND_SECONDS = 60.0
"""The backend waits so much longer than we do: it cannot name who hangs, and NCCL's watchdog ends the process."""


@dataclass(frozen=True)
class Launch:
    """What the launcher set for this process; no process group exists yet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"
    init_method: str = "env://"


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """The launch that the environment describes: torchrun, `srun` alone, or one process.

    Raises UserError for variables that contradict each other or are not numbers.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    # An interactive shell inside an allocation has SLURM_PROCID too; only a job step has SLURM_STEP_ID set
    # together with more than one task.
    if "SLURM_PROCID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _from_slurm(environ)
    return Launch()


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        raise UserError(f"environment variable {name} is {value!r}; it must be a whole number, set by the launcher")
    return int(value)


def _port(environ: Mapping[str, str], default: int | None = None) -> int:
    port = _number(environ, "MASTER_PORT", default)
    if not 0 < port < 2**16:
        raise UserError(f"environment variable MASTER_PORT is {port}; a port is a number from 1 to 65535")
    return port


def _from_torchrun(environ: Mapping[str, str]) -> Launch:
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    _check_below("RANK", rank, "WORLD_SIZE", world_size)
    init_method = environ.get(RENDEZVOUS, "env://")
    if world_size > 1 and init_method == "env://" and not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise UserError(
            f"WORLD_SIZE={world_size} but MASTER_ADDR and MASTER_PORT are not both set; start with torchrun, or set "
            f"{RENDEZVOUS}=file:///a/path/that/all/ranks/see"
        )
    if world_size > 1 and init_method == "env://":
        _port(environ)
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "environment"
    local_rank = _number(environ, "LOCAL_RANK", rank)
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", world_size)
    _check_below("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size)
    return Launch(rank, world_size, local_rank, local_world_size, launcher, init_method)


def _check_below(rank_name: str, rank: int, size_name: str, size: int) -> None:
    if rank >= size:
        raise UserError(
            f"environment variables {rank_name}={rank} and {size_name}={size}: the rank must be below the size; "
            "start with torchrun or srun, which set both"
        )


def _from_slurm(environ: Mapping[str, str]) -> Launch:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    # The job's id spreads concurrent jobs of one node over ports below Linux's ephemeral range.
    port = 20000 + _number(environ, "SLURM_JOB_ID") % 10000
    address = environ.get("MASTER_ADDR") or first_host(nodes)
    tasks = tasks_by_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = _number(environ, "SLURM_NODEID", 0)
    rank, world_size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    _check_below("SLURM_PROCID", rank, "SLURM_STEP_NUM_TASKS", world_size)
    return Launch(
        rank,
        world_size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=tasks[node] if node < len(tasks) else 1,
        launcher="srun",
        init_method=environ.get(RENDEZVOUS, f"tcp://{_in_url(address)}:{_port(environ, port)}"),
    )


def _in_url(address: str) -> str:
    """An IPv6 address in brackets, which set it off from the port."""
    return f"[{address}]" if ":" in address and not address.startswith("[") else address


def tasks_by_node(text: str) -> list[int]:
    """The tasks of each node of a Slurm step: ``2(x3),1`` gives [2, 2, 2, 1]. Raises UserError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, not counts such as 2(x3),1; start with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list: ``rack[0-3]node[07-9],login1`` gives ``rack0node07``. Raises UserError."""
    match = re.match(r"(?!\[)(?:[^\[\],\s]|\[\d[^\]]*\])+", nodelist)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST is {nodelist!r}, which names no host; start with srun or torchrun")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


@dataclass(frozen=True)
class Ranks:
    """The group of N processes that execute a run. With one process every method is a no-op."""

    rank: int
    world_size: int
    device: torch.device
    backend: str
    group: dist.ProcessGroup | None = None
    """The process group of these ranks; None: the launch's own, or none for one process."""
    whereabouts: Whereabouts = field(default_factory=Whereabouts, compare=False)
    """Where this rank is, for the others to name it if it hangs."""
    store: dist.Store | None = field(default=None, compare=False)
    """What the ranks of a launch share besides the group; None for one process."""

    @property
    def distributed(self) -> bool:
        """Whether gradients go through DDP: with several ranks, or with one that has a group of its own."""
        return self.world_size > 1 or self.group is not None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def wire_device(self) -> torch.device:
        """Where a tensor must live to be sent: gloo sends from main memory."""
        return torch.device("cpu") if self.backend == "gloo" else self.device

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all ranks. Exact only where all ranks but one hold zeros."""
        if self.world_size == 1:
            return tensor
        sent = tensor.to(self.wire_device)
        with self.whereabouts.waiting():
            dist.all_reduce(sent, group=self.group)
        return sent.to(tensor.device)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (plain Python values or bytes; others may pass None), on every rank."""
        if self.world_size == 1:
            return value
        holder = [value]
        with self.whereabouts.waiting():
            dist.broadcast_object_list(holder, group_src=0, group=self.group, device=self.wire_device)
        return holder[0]

    def from_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank; a UserError that it raises there is raised on all."""
        outcome: tuple[T | None, UserError | None] = (None, None)
        if self.is_main:
            try:
                outcome = (function(), None)
            except UserError as error:
                outcome = (None, error)
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (plain Python values), in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.whereabouts.waiting():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            with self.whereabouts.waiting():
                dist.barrier(group=self.group)


def choose_device(device: str, launch: Launch) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` to this rank's device. Raises UserError if there is no GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(
            "execution.device: 'cuda', but torch sees no GPU here; choose 'cpu' or 'auto', or fix the driver"
        )
    return torch.device("cuda", launch.local_rank % count)


def _gpus_of_machine(launch: Launch) -> int:
    """GPUs that the ranks on this machine have together."""
    visible = torch.cuda.device_count()
    if launch.launcher == "srun":
        # With --gpus-per-task or --gpu-bind each task sees its own alone.
        return max(visible, _number(os.environ, "SLURM_GPUS_ON_NODE", 0))
    return visible


def choose_backend(backend: str, device: torch.device, launch: Launch) -> str:
    """``auto``, ``nccl`` or ``gloo`` to a backend. Raises UserError where NCCL cannot work."""
    crowded = device.type == "cuda" and launch.local_world_size > _gpus_of_machine(launch)
    if backend == "auto":
        return "nccl" if device.type == "cuda" and not crowded else "gloo"
    if backend == "nccl" and (device.type != "cuda" or crowded):
        raise UserError(
            f"execution.backend: 'nccl' needs a GPU for each of the {launch.local_world_size} ranks on this machine; "
            "start fewer ranks, or choose 'gloo' or 'auto'"
        )
    return backend


@contextlib.contextmanager
def connect(
    launch: Launch | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    threads: int = 1,
    timeout_seconds: float = 600.0,
    group_of_one: bool = False,
) -> Iterator[Ranks]:
    """The ranks that run together, as a context: makes the process group and takes it down again.

    `threads` (intra-op) is set here for every N alike, since torchrun sets OMP_NUM_THREADS for several
    processes only, and the number of threads changes the order of sums inside a kernel. With `group_of_one`
    a process group exists for one process too, so that `Subgroups` can be made.
    """
    launch = launch or read_launch()
    torch.set_num_threads(threads)
    here = choose_device(device, launch)
    ranks = Ranks(launch.rank, launch.world_size, here, choose_backend(backend, here, launch))
    if here.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic
        torch.cuda.set_device(here)
    if launch.world_size == 1 and not group_of_one:
        yield ranks
        return
    store = _meet(launch, ranks, timeout_seconds)
    try:
        if launch.world_size == 1:
            yield ranks
        else:
            heartbeat = Heartbeat(
                ranks.whereabouts,
                store.clone(),
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timeout_seconds,
            )
            with heartbeat.running():
                yield replace(ranks, store=store)
    except BaseException:
        # Taking the group down waits for the others under NCCL, who may wait for us, and nobody would hear why. The
        # end of the process closes the connections.
        if launch.world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _meet(launch: Launch, ranks: Ranks, timeout_seconds: float) -> dist.Store:
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store: dist.Store = dist.HashStore()
    try:
        if launch.world_size > 1:
            store = open_store(launch.init_method, launch.rank, launch.world_size, timeout)
            store.set_timeout(timeout)  # a file store opens its file when it is first asked, and tries for so long
            store = dist.PrefixStore(_call_roll(store, launch, ranks, timeout), store)
        store.set_timeout(timeout)
        dist.init_process_group(
            ranks.backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout + datetime.timedelta(seconds=_BACKEND_SECONDS),
            device_id=ranks.device if ranks.backend == "nccl" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {launch.world_size} ranks ({launch.launcher}, {launch.init_method}) could not connect: {error}"
        ) from error
    return store


def _call_roll(store: dist.Store, launch: Launch, ranks: Ranks, timeout: datetime.timedelta) -> str:
    """Wait until all ranks are here; a prefix for what they leave in `store`."""
    rank, world_size = launch.rank, launch.world_size
    if under_agent():
        return name_attempt(store, rank=rank, world_size=world_size, timeout=timeout)
    call_roll(store, rank=rank, world_size=world_size, backend=ranks.backend, timeout=timeout)
    return "group"
