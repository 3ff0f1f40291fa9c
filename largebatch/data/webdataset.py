"""`largebatch data index DIR`: an index for existing WebDataset shards (`largebatch.data.shards`)."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from largebatch.data.files import SUFFIXES
from largebatch.data.pack import writing
from largebatch.data.shards import ENTRY, INDEX, read_index, write_index
from largebatch.errors import DataError
from largebatch.wording import some


class _Shard(NamedTuple):
    entries: np.ndarray
    """ENTRY [images]"""
    names: list[bytes]
    without: int
    """Samples that hold no image."""


def index(root: Path, *, jobs: int, class_names: Path | None, report: Callable[[str], None]) -> None:
    """Write the index of `root/train/*.tar` and `root/val/*.tar`; the shards stay as they are.

    A sample is KEY.jpg (or another kind of image) beside KEY.cls, a class number as text, or KEY.json with a `label`.
    Classes are called by the lines of the file `class_names`, else by their numbers. Raises DataError naming the shard.
    """
    parts = {folder: sorted(folder.glob("*.tar")) for folder in (root / "train", root / "val")}
    for folder, shards in parts.items():
        if not shards:
            raise DataError(f"{folder}: no *.tar in it; put the shards, or links to them, into {root}/train and /val")
        if (folder / INDEX).exists() and read_index(folder)["packed"]:
            raise DataError(f"{folder}: has the index of largebatch data pack, which holds more; remove it first")
    with ThreadPoolExecutor(jobs) as pool:
        found = {folder: list(pool.map(_read_shard, shards, range(len(shards)))) for folder, shards in parts.items()}
    entries = {folder: np.concatenate([shard.entries for shard in read]) for folder, read in found.items()}
    classes = _class_names(class_names, 1 + max(int(rows["label"].max()) for rows in entries.values()))
    for folder, read in found.items():
        counts = np.bincount(entries[folder]["label"], minlength=len(classes))
        if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
            report(f"warning: {folder}: no image of class {some(empty)}; labels are counted from 0")
        with writing(folder):
            image_names = [name for shard in read for name in shard.names]
            write_index(folder, classes, [path.name for path in parts[folder]], entries[folder], image_names, {})
        without = sum(shard.without for shard in read)
        left_out = f"; skipped samples without an image: {without:,}" if without else ""
        report(f"{folder}: {len(image_names):,} images in {len(read):,} shards{left_out}")


def _class_names(file: Path | None, classes: int) -> Sequence[str]:
    if file is None:
        return [str(number) for number in range(classes)]
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--class-names: {file} cannot be read ({error})") from None
    if len(names) < classes:
        raise DataError(f"--class-names: {file} has {len(names)} lines, but there are {classes} classes; one line each")
    return names


def _read_shard(path: Path, number: int) -> _Shard:
    entries, names, without = [], [], 0
    try:
        with tarfile.open(path, "r:") as archive:
            members = (member for member in archive if member.isreg())
            for key, group in itertools.groupby(members, lambda member: _split(member.name)[0]):
                sample = {_split(member.name)[1]: member for member in group}
                images = [member for kind, member in sample.items() if f".{kind}" in SUFFIXES]
                if not images:
                    without += 1
                    continue
                if len(images) > 1:
                    raise DataError(f"{path}: {key}: has {len(images)} images; each needs a key of its own")
                (image,) = images
                checksum = zlib.crc32(_content(archive, image))
                label = _label({kind: _content(archive, sample[kind]) for kind in ("cls", "json") if kind in sample})
                if label is None:
                    raise DataError(f"{path}: {key}: no label; it needs {key}.cls, a class number from 0 as text, or "
                                    f"{key}.json with a number 'label'")  # fmt: skip
                entries.append((image.offset_data, 0, image.size, image.size, checksum, number, label))
                names.append(os.fsencode(image.name))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read to its end as an uncompressed tar file ({error})") from None
    if not entries:
        raise DataError(f"{path}: no images in it (known: {' '.join(SUFFIXES)})")
    return _Shard(np.array(entries, ENTRY), names, without)


def _split(name: str) -> tuple[str, str]:
    """Key and kind of a member, as WebDataset has them: the kind begins at the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    key, _, kind = file.partition(".")
    return folder + slash + key, kind.lower()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _label(sample: dict[str, bytes]) -> int | None:
    """The class number that a sample's `cls`, else its `json`, holds; None if there is none."""
    try:
        label = int(sample["cls"]) if "cls" in sample else json.loads(sample["json"])["label"]
    except (ValueError, KeyError, TypeError):
        return None
    return label if type(label) is int and 0 <= label < 2**31 else None
