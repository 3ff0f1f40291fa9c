"""`largebatch data pack SOURCE DEST`: a folder of images becomes tar shards with an index (`largebatch.data.shards`).

Which images a shard holds, and every byte of it, depends on the source and the options alone: a pack that was killed
is resumed shard by shard, and ends with the files that it would have had without the kill.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from largebatch.data.files import FolderPictures, class_names
from largebatch.data.jpegtran import check_jpegtran, with_restart_markers
from largebatch.data.shards import ENTRY, INDEX, read_index, write_index, write_whole
from largebatch.errors import DataError

_WORK = ".packing"  # in a part's folder until its index is written: the plan, and the entries of finished shards
_BLOCK = tarfile.BLOCKSIZE
_SECONDS_BETWEEN_REPORTS = 5.0


def pack(
    source: Path,
    dest: Path,
    *,
    jobs: int,
    images_per_shard: int,
    restart_markers: bool = False,
    report: Callable[[str], None],
) -> None:
    """Pack `source/train/CLASS/*` and `source/val/CLASS/*` into `dest/train` and `dest/val`, `jobs` shards at a time.

    With `restart_markers`, JPEGs are coded anew, without loss, so that a crop needs no more than its part of the file.
    What is written is read back and compared. Raises DataError where the source cannot be read or `dest` not be
    written, or holds something else.
    """
    if restart_markers:
        check_jpegtran()
    classes = class_names(source)
    for part in ("train", "val"):
        pictures = FolderPictures(source / part, classes)
        with writing(dest / part):
            _Part(pictures, dest / part, images_per_shard, restart_markers, report).pack(jobs)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside, no other process packs into `folder`; what the system refuses is a DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(descriptor)
    except BlockingIOError:
        raise DataError(f"{folder}: another process is packing into it; wait for it, or stop it") from None
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be written ({error.strerror})") from None


class _Part:
    """The pack of one part of a set."""

    def __init__(
        self,
        pictures: FolderPictures,
        folder: Path,
        images_per_shard: int,
        restart_markers: bool,
        report: Callable[[str], None],
    ) -> None:
        self._pictures, self._folder, self._report = pictures, folder, report
        self._images_per_shard, self._restart_markers = images_per_shard, restart_markers
        self._stopped = threading.Event()
        self._started, self._reported, self._images = time.monotonic(), time.monotonic(), 0
        self._lock = threading.Lock()

    def pack(self, jobs: int) -> None:
        """Write the shards that are missing, then the index."""
        plan, work = self._plan(), self._folder / _WORK
        if self._is_done(plan):
            shutil.rmtree(work, ignore_errors=True)  # a kill came between the index and this
            self._report(f"{self._folder}: already packed, {len(self._pictures):,} images")
            return
        work.mkdir(exist_ok=True)
        write_whole(work / "plan.json", json.dumps(plan).encode())
        firsts = range(0, len(self._pictures), self._images_per_shard)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                entries = list(pool.map(self._shard, range(len(firsts))))
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        names = [self._pictures.file(index) for index in range(len(self._pictures))]
        shards = [_shard_name(number) for number in range(len(firsts))]
        write_index(self._folder, self._pictures.class_names, shards, np.concatenate(entries), names, plan)
        shutil.rmtree(work, ignore_errors=True)  # the pack is whole; NFS keeps a file that somebody still reads
        self._report(f"{self._folder}: {len(names):,} images in {len(shards):,} shards, read back and compared")

    def _plan(self) -> dict[str, Any]:
        """All that the shards' bytes depend on but the files' contents."""
        hashed = hashlib.sha256()
        for index in range(len(self._pictures)):
            hashed.update(self._pictures.file(index) + b"\n")
        return {
            "names": hashed.hexdigest(),
            "images_per_shard": self._images_per_shard,
            "restart_markers": self._restart_markers,
        }

    def _is_done(self, plan: dict[str, Any]) -> bool:
        """Whether the part was packed before. Raises DataError if the folder holds something else."""
        other = f"{self._folder}: holds something other than a pack of this source with these options"
        remedy = "choose another DEST, or remove this one"
        if (self._folder / INDEX).exists():
            if read_index(self._folder)["packed"] != plan:
                raise DataError(f"{other}; {remedy}")
            return True
        try:
            begun = json.loads((self._folder / _WORK / "plan.json").read_bytes())
        except FileNotFoundError:
            begun = plan if set(os.listdir(self._folder)) <= {_WORK} else None
        if begun != plan:
            raise DataError(f"{other}; {remedy}")
        return False

    def _shard(self, number: int) -> np.ndarray:
        """ENTRY [images] of a shard, which is written unless it is there already."""
        path, done = self._folder / _shard_name(number), self._folder / _WORK / f"{number:06d}.npy"
        first = number * self._images_per_shard
        indices = range(first, min(first + self._images_per_shard, len(self._pictures)))
        if done.exists() and path.exists():
            self._progress(len(indices))
            return np.load(done)
        partial = self._folder / _WORK / path.name
        with open(partial, "wb+") as file:
            entries = self._write(file, indices, number)
            file.flush()
            os.fsync(file.fileno())
            _read_back(file, entries, path)
        partial.replace(path)
        buffer = io.BytesIO()
        np.save(buffer, entries)
        write_whole(done, buffer.getvalue())
        return entries

    def _write(self, file: BinaryIO, indices: range, shard: int) -> np.ndarray:
        entries = np.zeros(len(indices), ENTRY)
        for entry, index in zip(entries, indices, strict=True):
            if self._stopped.is_set():
                raise DataError("stopped")
            name, label = self._pictures.name(index), self._pictures.label(index)
            data = Path(name).read_bytes()
            if len(data) >= 2**32:
                raise DataError(f"{name}: has {len(data)} bytes; an image must be smaller than 4 GiB")
            entry["source_size"] = len(data)
            if self._restart_markers:
                data = with_restart_markers(data)
            _append(file, f"{index:09d}{Path(name).suffix.lower()}", data)
            entry["offset"], entry["size"] = file.tell() - _padded(len(data)), len(data)
            entry["checksum"], entry["shard"], entry["label"] = zlib.crc32(data), shard, label
            _append(file, f"{index:09d}.cls", str(label).encode())
            self._progress(1)
        file.write(bytes(2 * _BLOCK))
        return entries

    def _progress(self, images: int) -> None:
        with self._lock:
            self._images += images
            now, total = time.monotonic(), len(self._pictures)
            if now - self._reported >= _SECONDS_BETWEEN_REPORTS:
                self._reported = now
                rate = self._images / (now - self._started)
                left = (total - self._images) / rate
                self._report(f"{self._folder}: {self._images:,} of {total:,} images, {rate:,.0f}/s, {left:,.0f} s left")


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _append(file: BinaryIO, name: str, data: bytes) -> None:
    """A member of a tar file, with nothing in its header that another run would not have."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    file.write(data)
    file.write(bytes(_padded(len(data)) - len(data)))


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _read_back(file: BinaryIO, entries: np.ndarray, path: Path) -> None:
    """Compare what was written with its checksums. Raises DataError."""
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from the page cache
    for entry in entries:
        data = os.pread(file.fileno(), int(entry["size"]), int(entry["offset"]))
        if zlib.crc32(data) != entry["checksum"]:
            raise DataError(f"{path}: what was read back differs from what was written; check the disk")
