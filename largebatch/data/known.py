"""Reading the known small sets: from the package (`digits`) or from the files that `fetch` left in `root`."""

from __future__ import annotations

import hashlib
import pickle
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from largebatch.errors import DataError

Split = tuple[Tensor, Tensor]  # uint8 [M, C, H, W], int64 [M]


class FileFacts(NamedTuple):
    """What a file of a set must be: bytes, and the checksum of the named algorithm."""

    size: int | None
    algorithm: str
    checksum: str


# The four IDX files of MNIST and its drop-ins, decompressed; torchvision reads them from the same folders.
_IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_IDX_SIZES = (47_040_016, 60_008, 7_840_016, 10_008)
_FASHION_SHA256 = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
_MNIST_SHA256 = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
# As torchvision.datasets.CIFAR10 lists them.
_CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}


def _idx_files(folder: str, checksums: tuple[str, ...]) -> dict[str, FileFacts]:
    facts = zip(_IDX, _IDX_SIZES, checksums, strict=True)
    return {f"{folder}/raw/{name}": FileFacts(size, "sha256", checksum) for name, size, checksum in facts}


# Set -> its files below `root`, in torchvision's layout.
FILES: dict[str, dict[str, FileFacts]] = {
    "fashion-mnist": _idx_files("FashionMNIST", _FASHION_SHA256),
    "mnist": _idx_files("MNIST", _MNIST_SHA256),
    "cifar10": {f"cifar-10-batches-py/{n}": FileFacts(None, "md5", c) for n, c in _CIFAR_MD5.items()},
}


def checked_bytes(path: Path, facts: FileFacts) -> bytes:
    """The content of a file that is what it should be. Raises DataError that says what is wrong with it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if facts.size is not None and len(data) != facts.size:
        raise DataError(f"{path}: damaged: {len(data)} bytes, not {facts.size}")
    found = hashlib.new(facts.algorithm, data, usedforsecurity=False).hexdigest()
    if found != facts.checksum:
        raise DataError(f"{path}: damaged: its {facts.algorithm} is {found}, not {facts.checksum}")
    return data


def read_known(name: str, root: Path) -> tuple[Split, Split]:
    """(train, val) of `digits`, `fashion-mnist`, `mnist` or `cifar10`, checksums compared; never downloads.

    Raises DataError that names the file and the command that fetches the set.
    """
    if name == "digits":
        return _digits()
    try:
        files = [checked_bytes(root / path, facts) for path, facts in FILES[name].items()]
    except DataError as error:
        raise DataError(f"{error}; fetch it with: largebatch data fetch {name} --root {root}") from None
    return _cifar10(files) if name == "cifar10" else (_idx_pair(*files[:2]), _idx_pair(*files[2:]))


def _digits() -> tuple[Split, Split]:
    """The digits shipped with the package; every fifth image is for validation."""
    shipped = resources.files("largebatch.data").joinpath("digits.npz")
    with shipped.open("rb") as file, np.load(file) as arrays:
        # The grey values are 0..16.
        images = torch.from_numpy(arrays["images"] * np.uint8(15))[:, None]
        labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    val = torch.arange(len(images)) % 5 == 0
    return (images[~val], labels[~val]), (images[val], labels[val])


def _idx_pair(images: bytes, labels: bytes) -> Split:
    """IDX files: 16 bytes of header before 28 x 28 images, 8 before labels."""
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy()
    numbers = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(pixels), torch.from_numpy(numbers)


def _cifar10(files: list[bytes]) -> tuple[Split, Split]:
    """Five training batches and one test batch; safe to unpickle, since their checksums were compared."""
    batches = [pickle.loads(data, encoding="latin1") for data in files[:6]]
    images = [torch.from_numpy(batch["data"]).view(-1, 3, 32, 32) for batch in batches]
    labels = [torch.tensor(batch["labels"]) for batch in batches]
    return (torch.cat(images[:5]), torch.cat(labels[:5])), (images[5], labels[5])
