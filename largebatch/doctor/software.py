"""Python, torch, torchvision, the exchange's backends, and the GPUs with their clocks."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib import metadata

import torch

from largebatch.doctor.finding import Finding, judged, size
from largebatch.training.precision import slow_precision

MINIMUM = {"torch": (2, 11), "torchvision": (0, 26)}
_QUERY = "index,name,temperature.gpu,clocks.sm,clocks.max.sm,clocks_throttle_reasons.active"
# nvidia-smi's bits; being idle (1) and clocks that somebody has set (2) are no slowdown.
_SLOWDOWNS = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "heat",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


def check_version(package: str, version: str | None) -> Finding:
    """An installed version against the least that is needed."""
    least = MINIMUM[package]
    wanted = ".".join(map(str, least))
    if version is None:
        return Finding(package, "error", "not installed", f"pip install '{package}>={wanted}'")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return judged(package, version, f"install {wanted} or newer" if numbers < least else "", level="error")


def installed(package: str) -> str | None:
    """The version of an installed package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_torchvision() -> Finding:
    """torchvision must be installed and be built for this torch, which only importing it shows."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a wheel for another torch raises RuntimeError, OSError or AttributeError
        remedy = "install torch and torchvision together, from the same index"
        return Finding("torchvision", "error", f"cannot be imported ({str(error).splitlines()[0]})", remedy)
    return check_version("torchvision", installed("torchvision"))


def check_backends(backends: list[str], gpus: int) -> Finding:
    """gloo for CPUs, NCCL for GPUs."""
    seen = ", ".join(backends) or "none"
    if "gloo" not in backends:
        return Finding("backends", "error", seen, "this torch has no gloo: several ranks need a build with gloo")
    lacks = gpus > 0 and "nccl" not in backends
    return judged("backends", seen, "GPUs without NCCL are slow: install torch's CUDA build" if lacks else "")


def check_gpus(names: list[str], driver_sees: int) -> Finding:
    """The GPUs that torch can use against those that the driver sees."""
    if not names and driver_sees:
        remedy = "torch sees none: check CUDA_VISIBLE_DEVICES, and that this torch is a CUDA build for that driver"
        return Finding("GPUs", "error", f"{driver_sees} in the machine", remedy)
    if not names:
        return Finding("GPUs", "ok", "none: runs use the CPU")
    mixed = len({name.split(",")[0] for name in names}) > 1
    remedy = "ranks wait for the slowest kind: choose one with CUDA_VISIBLE_DEVICES" if mixed else ""
    return judged("GPUs", "; ".join(names), remedy)


def check_precision(precision: str, device: torch.device) -> Finding:
    """A config's precision on the device that it is for: a CPU may only emulate it."""
    slow, _, remedy = slow_precision(precision, device).partition("; ")
    return judged("precision", slow.removeprefix("execution.precision: ") or f"{precision} on {device.type}", remedy)


def visible_gpus() -> list[str]:
    """Name and memory of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {size(device.total_memory)}" for device in devices]


def ask_nvidia_smi() -> list[str]:
    """A line of comma-separated values for each GPU that the driver sees; none without driver."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.count(",") == _QUERY.count(",")]


def check_gpu_clocks(lines: list[str]) -> list[Finding]:
    """One finding a GPU: its temperature, clock, and what slows it down at this moment."""
    findings = []
    for line in lines:
        index, _, temperature, clock, most, bits = (word.strip() for word in line.split(","))
        active = int(bits, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", bits) else 0
        reasons = [word for bit, word in _SLOWDOWNS.items() if active & bit]
        seen = f"{temperature} °C, {clock} of {most} MHz" + (f", slowed down: {', '.join(reasons)}" if reasons else "")
        remedy = "ranks would wait for it: check cooling, power and other users (nvidia-smi -q -d PERFORMANCE)"
        findings.append(judged(f"GPU {index} clocks", seen, remedy if reasons else ""))
    return findings


def check_python() -> Finding:
    """The interpreter; older ones cannot even start this."""
    return Finding("Python", "ok", platform.python_version())
