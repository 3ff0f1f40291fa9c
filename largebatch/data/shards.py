"""Images in tar shards, found by an index: random access, the folder's order, and few large files instead of millions.

A part of a set (`train/`, `val/`) is a folder with the shards, which any WebDataset reader opens too, and

- `index.json`: class names, the shards' names and sizes, and the SHA-256 of the two arrays and of itself;
- `entries.npy`: for each image in order its shard, place, size, CRC-32 and label (`ENTRY`);
- `names.npy`: the images' names, each ended by a line feed.

The arrays are mapped into memory: ranks and loader processes of a host share one copy.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from largebatch.data.pictures import Picture, picture_from
from largebatch.errors import DataError

ENTRY = np.dtype(
    [
        ("offset", "<u8"),
        ("name_end", "<u8"),  # in names.npy, line feed included
        ("size", "<u4"),
        ("source_size", "<u4"),  # of the file that was packed; restart markers change it
        ("checksum", "<u4"),
        ("shard", "<u4"),
        ("label", "<u4"),
    ]
)
INDEX, _ENTRIES, _NAMES = "index.json", "entries.npy", "names.npy"
_FORMAT = "largebatch shards 1"
_OPEN_FILES = 256  # shards that a process holds open, of the 1024 files that it may
SIZED = 10_000  # files whose sizes are part of the fingerprint: asking for all of a million takes minutes


class ShardPictures:
    """The images of one part, as `Pictures`: numbered as in the folder that was packed."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """Raises DataError if the index is damaged, or a shard is missing or has another size."""
        index = read_index(folder)
        self.class_names = tuple(index["class_names"])
        self.classes = len(self.class_names)
        self._folder, self._shards = str(folder), [shard["name"] for shard in index["shards"]]
        for shard in index["shards"]:
            _check_size(folder / shard["name"], shard["bytes"])
        self._map()
        self._count = min(limit or len(self._entries), len(self._entries))

    def _map(self) -> None:
        self._entries, self._names = (
            np.load(os.path.join(self._folder, name), mmap_mode="r") for name in (_ENTRIES, _NAMES)
        )
        self._open: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_entries", "_names", "_open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()

    def __len__(self) -> int:
        return self._count

    def _place(self, index: int) -> int:
        """Where an image is in the index; a `limit` takes evenly spread ones."""
        return index * len(self._entries) // self._count

    def _name(self, place: int) -> bytes:
        start = int(self._entries["name_end"][place - 1]) if place else 0
        return self._names[start : int(self._entries["name_end"][place]) - 1].tobytes()

    def fingerprint(self) -> str:
        """That of the folder that was packed: see `FolderPictures.fingerprint`."""
        if self._count == len(self._entries):
            hashed = hashlib.sha256(self._names[:-1])
        else:
            hashed = hashlib.sha256(b"\n".join(self._name(self._place(index)) for index in range(self._count)))
        for index in range(0, self._count, -(-self._count // SIZED)):
            hashed.update(b"%d\n" % self._entries["source_size"][self._place(index)])
        return hashed.hexdigest()

    def listing(self) -> str:
        """None: see `ImageSource.listing`."""
        return ""

    def name(self, index: int) -> str:
        place = self._place(index)
        shard = self._shards[self._entries["shard"][place]]
        return f"{os.path.join(self._folder, shard)}: {os.fsdecode(self._name(place))}"

    def picture(self, index: int) -> tuple[Picture, int]:
        entry = self._entries[self._place(index)]
        try:
            data = os.pread(self._descriptor(int(entry["shard"])), int(entry["size"]), int(entry["offset"]))
        except OSError as error:
            raise DataError(f"{self.name(index)}: cannot be read ({error.strerror})") from None
        if zlib.crc32(data) != entry["checksum"]:
            raise DataError(
                f"{self.name(index)}: is damaged (its checksum is not that of the index); pack the set again, or set "
                "data.on_error=skip"
            )
        return picture_from(self.name(index), data), int(entry["label"])

    def _descriptor(self, shard: int) -> int:
        """The shard's open file; the one opened first is closed when there are too many."""
        if shard not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(os.path.join(self._folder, self._shards[shard]), os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def __del__(self) -> None:
        for descriptor in vars(self).get("_open", {}).values():
            os.close(descriptor)


def write_index(
    folder: Path,
    class_names: Sequence[str],
    shards: Sequence[str],
    entries: np.ndarray,
    names: Sequence[bytes],
    packed: dict[str, Any],
) -> None:
    """Write the index of `shards` in `folder`, `index.json` last: with it, the part is whole.

    entries: ENTRY [images], all but `name_end` filled in; `packed` says of what and how the shards were made.
    """
    entries["name_end"] = np.cumsum([len(name) + 1 for name in names])
    blob = np.frombuffer(b"".join(name + b"\n" for name in names), np.uint8)
    hashes = {}
    for name, array in ((_ENTRIES, entries), (_NAMES, blob)):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        write_whole(folder / name, buffer.getvalue())
        hashes[name] = hashlib.sha256(buffer.getbuffer()).hexdigest()
    index = {
        "format": _FORMAT,
        "class_names": list(class_names),
        "images": len(entries),
        "shards": [{"name": name, "bytes": (folder / name).stat().st_size} for name in shards],
        "arrays": hashes,
        "packed": packed,
    }
    text = json.dumps(index | {"sha256": _digest(index)}, indent=1)
    write_whole(folder / INDEX, text.encode())


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file atomically: no one sees half of it."""
    partial = path.with_name(f".{path.name}.part")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_index(folder: Path) -> dict[str, Any]:
    """`index.json`, after its checksum and those of the arrays were compared. Raises DataError naming the file."""
    path = folder / INDEX
    text = _read(path)
    try:
        index = json.loads(text)
        digest = index.pop("sha256")
        if index["format"] != _FORMAT:
            raise DataError(f"{path}: is of the format {index['format']!r}, not {_FORMAT!r}; index the shards again")
        whole = digest == _digest(index)
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    _check_whole(path, whole)
    for name, sha256 in index["arrays"].items():
        _check_whole(folder / name, hashlib.sha256(_read(folder / name)).hexdigest() == sha256)
    return index


def _check_whole(path: Path, whole: bool) -> None:
    if not whole:
        raise DataError(
            f"{path}: is damaged (its checksum differs); copy it again, or make it again with largebatch data index"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); data.root must hold train/ and val/, each with shards and "
            "their index, as largebatch data pack and data index make them"
        ) from None


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), but the index has it; copy it again") from None
    if size != expected:
        raise DataError(f"{path}: has {size} bytes, {expected} in the index; copy it again, or pack the set again")
