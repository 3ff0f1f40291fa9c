"""What a run ran on, for ``environment.json``: enough to explain, a year later, why two runs differ."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("largebatch", "torch", "torchvision", "numpy")
# By name or prefix, so that no secrets get into a file that is passed around.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_VARIABLE_PREFIXES = (
    "OMP_",
    "MKL_",
    "NCCL_",
    "GLOO_",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "PYTORCH_",
    "SLURM_JOB_",
    "SLURM_NNODES",
)


def describe_environment() -> dict[str, Any]:
    """Versions, machine, accelerators, source and start of this process, as JSON can hold it.

    Sizes are in bytes. What this machine does not have or reveal is None.
    """
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # The interpreter by its name: where it lies says nothing that another machine could use.
        "command": [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]],
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
        "cuda": _cuda(),
        "git": _git(Path(__file__)),
        "variables": _variables(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    """The CPU's model, its vector instructions, whether it computes in bf16, the machine's logical cores, and those
    that this process may use: virtual machines may call very different processors by one name."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "cores": os.cpu_count(),
        "usable_cores": usable,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cuda() -> dict[str, Any] | None:
    """GPUs and the libraries that drive them; None where torch sees no GPU."""
    if not torch.cuda.is_available():
        return None
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "devices": [{"name": device.name, "memory": device.total_memory} for device in devices],
        "driver": drivers.splitlines()[0] if drivers else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": _nccl_version(),
    }


def _nccl_version() -> str | None:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError):  # a torch built without NCCL
        return None


def _git(source: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks ``source``, and whether tracked files differ from it.

    None for an installed copy: the repository around a virtual environment says nothing about it.
    """
    folder = str(source.parent)
    if _output("git", "-C", folder, "ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = _output("git", "-C", folder, "rev-parse", "HEAD")
    changes = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def _output(*command: str) -> str | None:
    """What ``command`` prints; None if it is missing, fails, or takes more than ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _variables() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)
    }


def code_digest() -> str:
    """SHA-256 of the package's own source files: two machines that differ in it run different code."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
