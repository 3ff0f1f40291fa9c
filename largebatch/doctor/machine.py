"""Cores, memory, shared memory, clocks and disk: what the kernel's files say, below any `root` (tests bring theirs)."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from largebatch.doctor.finding import Finding, judged, size

GIB = 1024**3
_PROCESS = GIB // 2  # what a Python with torch takes before it has done anything
_SLOW_DISK = 50e6  # bytes/s: below, ResNet-50's checkpoint of 200 MB takes more than 4 s
_TRIAL = 32 * 1024**2
_SLEEPY = ("powersave", "conservative")


@dataclass(frozen=True)
class Demand:
    """What a run asks of this machine."""

    ranks: int = 1
    threads: int = 1
    loader_processes: int = 0
    """Of each rank."""
    shared_memory: int = 0
    """Bytes that loader processes keep ready, of all ranks."""
    checkpoints: int = 0
    """Bytes of all checkpoints that are kept, and the one that is being written."""

    @property
    def processes(self) -> int:
        return self.ranks * (1 + self.loader_processes)


def limits(root: Path, controller: str, name: str, old_name: str) -> list[str]:
    """The contents of a cgroup file, of this process's group and of those around it; version 2, else version 1."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount, file = (root / "sys/fs/cgroup", name) if not controllers else (_version_1(root, controllers), old_name)
        here = mount / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder == mount or mount in folder.parents:
                found += _lines(folder / file)[:1]
    return found


def _version_1(root: Path, controllers: str) -> Path:
    together = root / "sys/fs/cgroup" / controllers
    return together if together.exists() else root / "sys/fs/cgroup" / controllers.split(",")[0]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def core_limit(root: Path) -> float | None:
    """Cores that the cgroup lets this process use; None without a limit."""
    quotas = [text.split() for text in limits(root, "cpu", "cpu.max", "cpu.cfs_quota_us")]
    periods = limits(root, "cpu", "", "cpu.cfs_period_us")
    cores = []
    for index, words in enumerate(quotas):
        period = words[1] if len(words) > 1 else periods[index] if index < len(periods) else "100000"
        if words[0] not in ("max", "-1"):
            cores.append(int(words[0]) / int(period))
    return min(cores, default=None)


def memory_limit(root: Path) -> int | None:
    """Bytes that the cgroup lets this process use; None without a limit."""
    values = [int(text) for text in limits(root, "memory", "memory.max", "memory.limit_in_bytes") if text.isdecimal()]
    return min((value for value in values if value < 2**60), default=None)


def check_cores(root: Path, usable: int, demand: Demand) -> Finding:
    """Cores, less what affinity and the cgroup take away, against the processes and threads of a run."""
    limit = core_limit(root)
    cores = min(usable, limit) if limit else usable
    seen = f"{cores:g} cores for {demand.ranks} x ({demand.threads} threads + {demand.loader_processes} loaders)"
    if limit and limit < usable:
        seen += f" (the cgroup allows {limit:g} of {usable})"
    wanted = demand.ranks * (demand.threads + demand.loader_processes)
    return judged(
        "cores",
        seen,
        f"{wanted} would run at once: ask for more cores, or lower data.loader_processes or execution.threads"
        if wanted > cores
        else "",
    )


def check_memory(root: Path, demand: Demand) -> Finding:
    """Memory that is free, within the cgroup's limit, against the least that this many processes need."""
    info = {line.split(":")[0]: line.split()[1] for line in _lines(root / "proc/meminfo") if ":" in line}
    if "MemAvailable" not in info:
        return Finding("memory", "warning", "cannot be read from /proc/meminfo", "check that /proc is mounted")
    available, limit = int(info["MemAvailable"]) * 1024, memory_limit(root)
    usable = min(available, limit) if limit else available
    seen = f"{size(usable)} free" + (f", {size(limit)} allowed by the cgroup" if limit else "")
    need = demand.processes * _PROCESS
    return judged(
        "memory",
        seen,
        f"{demand.processes} processes need about {size(need)}: ask for more memory, or lower data.loader_processes"
        if usable < need
        else "",
    )


def check_shared_memory(free: int | None, demand: Demand) -> Finding:
    """Free bytes in /dev/shm, where loader processes leave their images, against what they keep ready."""
    subject, more = "shared memory", "give the container more (--shm-size=8g, or --ipc=host)"
    if free is None:
        bad = demand.loader_processes > 0
        remedy = "mount a tmpfs at /dev/shm, or set data.loader_processes=0" if bad else ""
        return judged(subject, "no /dev/shm", remedy, level="error")
    seen = f"{size(free)} free in /dev/shm for {size(demand.shared_memory)} of images kept ready"
    if free < demand.shared_memory:
        less = f"{more}, or lower data.loader_processes or data.prefetch: otherwise loader processes will crash"
        return Finding(subject, "error", seen, less)
    return judged(subject, seen, more if free < 2 * demand.shared_memory else "")


def free_bytes(folder: Path) -> int | None:
    """Free bytes of the file system that holds `folder`; None if it does not exist."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def check_clocks(root: Path) -> Finding:
    """The CPU's frequency governor, and how often it was throttled since it was started."""
    cpus = root / "sys/devices/system/cpu"
    governors = {line for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor") for line in _lines(path)}
    counts = [_lines(path)[:1] for path in cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    throttled = sum(int(text) for found in counts for text in found)
    if not governors and not counts:
        return Finding("CPU clocks", "ok", "not reported by this machine (as on most virtual machines)")
    seen = f"governor {', '.join(sorted(governors)) or 'unknown'}, throttled {throttled} times since boot"
    if throttled:
        return Finding("CPU clocks", "warning", seen, "the CPU overheated: check its cooling, or timings will vary")
    sleepy = governors & set(_SLEEPY)
    return judged("CPU clocks", seen, "for steady timings: cpupower frequency-set -g performance" if sleepy else "")


def check_disk(run_dir: Path, demand: Demand) -> Finding:
    """Free space and speed of the disk that will hold the run folder; writes 32 MiB there and removes them."""
    # os.path's, because Path's raise where a name is too long, or a folder may not be searched.
    wanted = run_dir.absolute()
    folder = next(path for path in (wanted, *wanted.parents) if os.path.isdir(path))
    trial = folder / f".largebatch-doctor-{os.getpid()}"
    other = "choose another --run-dir"
    try:
        _check_name(wanted)
        free = shutil.disk_usage(folder).free
        if free < 2 * _TRIAL + demand.checkpoints:
            kept = f"the kept checkpoints need {size(demand.checkpoints)}: " if demand.checkpoints else ""
            return Finding("disk", "error", f"{size(free)} free in {folder}", f"{kept}free some, or {other}")
        rate = _TRIAL / _seconds_to_write(trial)
    except OSError as error:
        return Finding("disk", "error", f"{error.filename or folder}: cannot be written ({error.strerror})", other)
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)
    slow = "checkpoints will be slow: choose a faster disk for --run-dir, or write fewer" if rate < _SLOW_DISK else ""
    return judged("disk", f"{size(free)} free in {folder}, {rate / 1e6:.0f} MB/s written", slow)


def _check_name(folder: Path) -> None:
    """Raise OSError for what could never be made a folder: a file, too long a name, below what may not be searched."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _seconds_to_write(path: Path) -> float:
    data = os.urandom(_TRIAL)
    start = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start
