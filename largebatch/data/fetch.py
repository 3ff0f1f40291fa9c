"""Downloading the known small sets: `largebatch data fetch NAME`."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from largebatch.data.known import FILES, checked_bytes
from largebatch.data.settings import FROM_FILES
from largebatch.errors import DataError

_NETWORK_TIMEOUT = 15  # seconds without an answer
_APT_TIMEOUT = 300
_DEBIAN = {"fashion-mnist": ("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")}


def fetch(name: str, root: Path, report: Callable[[str], None] = print) -> Path:
    """Put a known set below `root`, verified, in torchvision's layout; returns the folder with its files.

    Tries in this order: already there; torchvision's download; Debian's package, which needs no root. Files
    appear whole or not at all. Raises DataError that says what was tried and what to do by hand.
    """
    if name in ("digits", "synthetic"):
        report(f"{name}: nothing to fetch, it comes with the package")
        return root
    if name == "shards":
        raise DataError("shards: cannot be downloaded; largebatch data pack makes them from a folder of images")
    if name in FROM_FILES:
        raise DataError(f"{name}: cannot be downloaded; put it in {root}/train/CLASS/ and {root}/val/CLASS/")
    if name not in FILES:
        raise DataError(f"{name}: unknown set; sets that can be fetched: {', '.join(FILES)}")
    folder = root / Path(next(iter(FILES[name]))).parent
    missing = _fault(name, root)
    if missing is None:
        report(f"{name}: already in {folder}, checksums agree")
        return folder
    failures = [f"already there: {missing}"]
    ways = {"torchvision's download": _from_torchvision, "Debian's package": _from_debian}
    for way, obtain in ways.items():
        if obtain is _from_debian and name not in _DEBIAN:
            continue
        report(f"{name}: trying {way}")
        try:
            with _scratch(root) as scratch:
                obtain(name, scratch)
                _install(name, scratch, root)
        except (DataError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            failures.append(f"{way}: {_reason(error)}")
            continue
        report(f"{name}: in {folder}, checksums agree")
        return folder
    wanted = "\n  ".join(str(root / path) for path in FILES[name])
    raise DataError(
        f"{name}: could not be downloaded. Tried\n  " + "\n  ".join(failures) + "\n"
        f"Put these files there by hand (decompressed) and run the command again:\n  {wanted}"
    )


def _fault(name: str, root: Path) -> str | None:
    """What is wrong with the set's files below `root`; None where they are all as they should be."""
    try:
        for path, facts in FILES[name].items():
            checked_bytes(root / path, facts)
    except DataError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `root`, so that its files can be renamed into place."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
        yield Path(scratch)


def _install(name: str, scratch: Path, root: Path) -> None:
    """Verify every file in `scratch`, then rename them into place."""
    for path, facts in FILES[name].items():
        checked_bytes(scratch / path, facts)
    for path in FILES[name]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / path, root / path)


def _from_torchvision(name: str, scratch: Path) -> None:
    from torchvision import datasets

    sets = {"fashion-mnist": datasets.FashionMNIST, "mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            sets[name](scratch, download=True)
    finally:
        socket.setdefaulttimeout(before)


def _from_debian(name: str, scratch: Path) -> None:
    """Download and unpack the package without installing it; its files are gzip files of the set's."""
    package, inside = _DEBIAN[name]
    try:
        _run(["apt-get", "download", package], scratch)
    except RuntimeError:
        if os.geteuid() != 0:
            raise
        _run(["apt-get", "update"], scratch)  # the package lists may be empty, as in a container
        _run(["apt-get", "download", package], scratch)
    archive = next(scratch.glob("*.deb"))
    _run(["dpkg-deb", "-x", archive.name, "unpacked"], scratch)
    for path in FILES[name]:
        target = scratch / path
        target.parent.mkdir(parents=True, exist_ok=True)
        packed = scratch / "unpacked" / inside / f"{target.name}.gz"
        target.write_bytes(gzip.decompress(packed.read_bytes()))


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_APT_TIMEOUT)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not on this machine") from None
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


def _reason(error: Exception) -> str:
    """One line of an error message: the last that says something."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
