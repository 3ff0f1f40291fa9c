"""Image files that do not fit in memory: decoded in loader processes as they are needed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from largebatch.data.loaders import make_loader, starting
from largebatch.data.operations import Operations, make_operations
from largebatch.data.pictures import (
    CROP_DRAWS,
    Picture,
    check_label,
    check_many,
    describe,
    from_object,
    open_picture,
    training_view,
    validation_view,
)
from largebatch.data.pixels import Normalise, image_draws
from largebatch.data.settings import DataSettings
from largebatch.data.shards import SIZED
from largebatch.data.source import Batches, Pass
from largebatch.errors import DataError
from largebatch.wording import reason

_log = logging.getLogger(__name__)
_LISTED = 1_000
_SKIPPED_IN_A_ROW = 100  # more than this is not a bad image but a failed disk
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff",
             ".gif", ".avif")  # fmt: skip


Label = int | Tensor
"""The number of a class, or with `data.multi_label` 0 or 1 for each, float32 [classes]."""


class Pictures(Protocol):
    """Numbered pictures with labels; pickled to the loader processes."""

    classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`."""
        ...

    def listing(self) -> str:
        """See `ImageSource.listing`."""
        ...

    def name(self, index: int) -> str:
        """What a picture is called in messages."""
        ...

    def picture(self, index: int) -> tuple[Picture, Label]:
        """A picture and its label. Raises DataError, naming the file."""
        ...


class FolderPictures:
    """`folder/CLASS/**/*.jpg`, in sorted order, so that every machine numbers the files alike."""

    def __init__(
        self, folder: Path, classes: Sequence[str], limit: int | None = None, *, of: Sequence[str] = ()
    ) -> None:
        """`classes` are the folders; where they are not all classes, `of` names all in the order of their numbers."""
        all_classes = list(of or classes)
        names = [images_in(folder / name) for name in classes]
        # Bytes in one array, not a list of strings: 1.3 million of these are copied to every loader process.
        files = [os.fsencode(f"{c}/{n}") for c, found in zip(classes, names, strict=True) for n in found]
        labels = np.repeat([all_classes.index(c) for c in classes], [len(found) for found in names])
        count = min(limit or len(files), len(files))
        chosen = np.arange(count) * len(files) // count
        self.classes, self.class_names = len(all_classes), tuple(all_classes)
        self._folder = str(folder)
        self._files, self._labels = np.array(files)[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self._files)

    def fingerprint(self) -> str:
        """Of the files' names, which hold the class, and of the sizes of 10,000 evenly spread ones."""
        hashed = hashlib.sha256(b"\n".join(self._files.tolist()))
        for index in range(0, len(self), -(-len(self) // SIZED)):
            with contextlib.suppress(OSError):  # reading it reports the error
                hashed.update(b"%d\n" % os.stat(self.name(index)).st_size)
        return hashed.hexdigest()

    def listing(self) -> str:
        """Names and sizes of at most 1,000 files, else a hash of the names in each class; a blank separates the two."""
        files = [os.fsdecode(name) for name in self._files.tolist()]
        if len(files) <= _LISTED:
            paths = [os.path.join(self._folder, file) for file in files]
            return "\n".join(
                f"{file} {os.path.getsize(path) if os.path.exists(path) else 'unreadable'}"
                for file, path in zip(files, paths, strict=True)
            )
        found: dict[str, Any] = {}
        for file in self._files.tolist():
            found.setdefault(os.fsdecode(file.partition(b"/")[0]), hashlib.sha256()).update(file + b"\n")
        return "\n".join(f"{name}/ {hashed.hexdigest()[:8]}" for name, hashed in found.items())

    def file(self, index: int) -> bytes:
        """A file's name below the folder."""
        return bytes(self._files[index])

    def label(self, index: int) -> int:
        """The number of an image's class."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(self.file(index)))

    def picture(self, index: int) -> tuple[Picture, int]:
        return open_picture(self.name(index)), self.label(index)


class DatasetPictures:
    """A map-style dataset of your own, giving (PIL image or uint8 [C, H, W] tensor, label)."""

    def __init__(
        self, dataset: Any, classes: int, where: str, limit: int | None = None, multi_label: bool = False
    ) -> None:
        try:
            count = len(dataset)
        except Exception as error:
            raise DataError(f"{where}: {reason(error)}") from error
        if count == 0:
            raise DataError(f"{where}: the dataset has no images")
        self.classes = classes
        names = getattr(dataset, "classes", ())
        self.class_names = tuple(map(str, names if len(names) == classes else range(classes)))
        self._dataset, self._where, self._multi_label = dataset, where, multi_label
        self._count = min(limit or count, count)

    def __len__(self) -> int:
        return self._count

    def fingerprint(self) -> str:
        """Of the number of images alone: all else is the dataset's own."""
        return str(self._count)

    def listing(self) -> str:
        return ""

    def name(self, index: int) -> str:
        return f"{self._where}, image {index}"

    def picture(self, index: int) -> tuple[Picture, Label]:
        try:
            item = self._dataset[index]
        except Exception as error:
            raise DataError(f"{self.name(index)}: {reason(error)}") from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"{self.name(index)}: the dataset gives {describe(item)}; it must give (image, label)")
        picture, label = item
        try:
            if self._multi_label:
                return from_object(picture), check_many(label, [self.classes], "its label")
            return from_object(picture), check_label(label, self.classes)
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from None


class Decoded(NamedTuple):
    """A pass as it leaves a loader process."""

    images: Tensor
    """uint8 [n, size, size, 3]"""
    labels: Tensor
    """int64 [n]"""
    skipped: list[str]
    """What was wrong with each picture that another stands in for, or that is left out."""


class Decoder:
    """What a loader process runs: a pass in, its pictures out."""

    def __init__(
        self,
        pictures: Pictures,
        settings: DataSettings,
        seed: int,
        *,
        augment: bool,
        operations: Operations | None,
        validates: bool,
    ) -> None:
        """If it `validates`, a picture that may be skipped is left out, else the next good one stands in for it."""
        self._pictures, self._settings, self._seed = pictures, settings, seed
        self._crop = augment and settings.augmentation.kind != "none"
        self._operations = operations if augment else None
        self._validates = validates

    def __getitem__(self, requested: Pass) -> Decoded | DataError:
        try:
            return _shared(self._decode(requested))
        except DataError as error:
            # Handed over, not raised: DataLoader would wrap the message in the process's traceback.
            return error

    def _decode(self, requested: Pass) -> Decoded:
        settings, skipped = self._settings, list[str]()
        size = settings.val_size if self._validates else settings.train_size(requested.epoch)
        images = torch.empty(len(requested.indices), size, size, 3, dtype=torch.uint8)
        labels = torch.empty(len(requested.indices), dtype=torch.int64)
        if settings.multi_label:
            labels = torch.empty(len(requested.indices), self._pictures.classes)
        draws = image_draws(requested.indices, CROP_DRAWS, seed=self._seed, epoch=requested.epoch).tolist()
        row = 0
        for draw, index in zip(draws, requested.indices.tolist(), strict=True):
            if (good := self._good_view(index % len(self._pictures), draw, size, skipped)) is not None:
                images[row], labels[row] = good
                row += 1
        if self._operations is not None:
            self._operations(images, requested.epoch, requested.indices)
        return Decoded(images[:row], labels[:row], skipped)

    def _good_view(
        self, index: int, draws: Sequence[float], size: int, skipped: list[str]
    ) -> tuple[Tensor, Label] | None:
        """A picture as the model sees it, and its label; if it may be skipped, of the next good one, or none."""
        if self._settings.on_error == "stop":
            return self._view(index, draws, size)
        if self._validates:
            try:
                return self._view(index, draws, size)
            except DataError as error:
                skipped.append(str(error))
                return None
        for candidate in range(index, index + _SKIPPED_IN_A_ROW):
            try:
                return self._view(candidate % len(self._pictures), draws, size)
            except DataError as error:
                skipped.append(str(error))
        raise DataError(f"{skipped[-1]} ({_SKIPPED_IN_A_ROW} image files in a row are unusable, so none is skipped)")

    def _view(self, index: int, draws: Sequence[float], size: int) -> tuple[Tensor, Label]:
        try:
            picture, label = self._pictures.picture(index)
            if self._crop:
                return training_view(picture, draws, size, self._settings.augmentation), label
            return validation_view(picture, self._settings.short_side_of(size), size), label
        except DataError:
            raise
        except Exception as error:  # whatever a library or the user's own code does with a file
            raise DataError(f"{self._pictures.name(index)}: {reason(error)}") from error


def _shared(decoded: Decoded) -> Decoded:
    """The same, in shared memory where a loader process hands it over.

    DataLoader would move it there in a thread of its own; where that fails, the batch is lost and waited for for ever.
    """
    if get_worker_info() is not None:
        try:
            decoded.images.share_memory_()
            decoded.labels.share_memory_()
        except RuntimeError as error:
            raise DataError(
                f"a loader process has no shared memory left ({error}): lower data.loader_processes or "
                "data.prefetch, or give the container more --shm-size"
            ) from None
    return decoded


class PictureSource:
    """An `ImageSource` over pictures that are decoded when they are needed."""

    def __init__(
        self,
        pictures: Pictures,
        settings: DataSettings,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        device: torch.device,
        validates: bool = False,
    ) -> None:
        """A source that `validates` replaces no picture by another, and keeps its loader processes between streams."""
        self.leaves_out = validates and settings.on_error == "skip"
        self._validates = validates
        self._kept: tuple[_Passes, DataLoader] | None = None
        self.images, self.classes = len(pictures), pictures.classes
        self.class_names, self.mean, self.std = pictures.class_names, tuple(mean), tuple(std)
        size = settings.val_size if validates else settings.image_size
        self.shape = (3, size, size)
        self.resize_size: int | None = settings.short_side
        self._pictures, self._settings, self._seed, self._device = pictures, settings, seed, device
        self._operations = make_operations(settings.augmentation, mean=mean, seed=seed)
        self._normalise: dict[int, Normalise] = {}
        self.skipped = 0
        self._known_bad: set[str] = set()

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`."""
        return self._pictures.fingerprint()

    def listing(self) -> str:
        """See `ImageSource.listing`."""
        return self._pictures.listing()

    def stream(self, passes: Iterable[Pass], *, augment: bool) -> Batches:
        """See `ImageSource.stream`."""
        loader = self._loader(passes, augment)
        with starting():
            batches = iter(loader)
        finished = False
        try:
            while (batch := _next(batches)) is not None:
                if isinstance(batch, DataError):
                    raise batch
                self._count(batch.skipped)
                images, labels = (part.to(self._device, non_blocking=True) for part in (batch.images, batch.labels))
                yield self._normalised(images), labels
            finished = True
        finally:
            if not finished:
                self._kept = None
            del batches, loader  # ends the loader processes, unless they are kept

    def _normalised(self, images: Tensor) -> Tensor:
        size = images.shape[1]
        if size not in self._normalise:
            self._normalise[size] = Normalise(self.mean, self.std, (3, size, size), self._device)
        return self._normalise[size](images)

    def _count(self, skipped: list[str]) -> None:
        """Count the pictures that were skipped, and name each of them once."""
        self.skipped += len(skipped)
        for problem in sorted(set(skipped) - self._known_bad):
            instead = "it is left out" if self._validates else "the next good image replaces it"
            _log.warning("warning: %s; %s (data.on_error: skip)", problem, instead)
        self._known_bad.update(skipped)

    def _loader(self, passes: Iterable[Pass], augment: bool) -> DataLoader:
        if self._validates and self._kept is not None:
            self._kept[0].now = passes
            return self._kept[1]
        settings, given = self._settings, iter(passes)
        first = list(itertools.islice(given, 1))  # no later one has more images
        largest = settings.val_size if self._validates else settings.largest_train_size
        asked = _Passes(itertools.chain(first, given))
        loader = make_loader(
            Decoder(
                self._pictures,
                settings,
                self._seed,
                augment=augment,
                operations=self._operations,
                validates=self._validates,
            ),
            asked,
            processes=settings.loader_processes,
            prefetch=settings.prefetch,
            pass_bytes=sum(3 * largest**2 * len(one.indices) for one in first),
            where=f"data.name {settings.name}",
            keep=self._validates,
            pin=self._device.type == "cuda",
        )
        if self._validates:
            self._kept = asked, loader
        return loader


class _Passes:
    """What a loader is asked for; another time, other passes."""

    def __init__(self, now: Iterable[Pass]) -> None:
        self.now = now

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.now)


def _next(batches: Iterator[Any]) -> Decoded | DataError | None:
    """The next batch, None after the last, or what went wrong.

    Returned and not raised here: a traceback would hold on to `batches`, and that to the loader processes.
    """
    try:
        return next(batches, None)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("exited unexpectedly", "is killed by signal")):
            raise
        return DataError(
            f"a loader process died ({str(error).splitlines()[0]}); often too little memory or shared "
            "memory: lower data.loader_processes or data.prefetch, or give the container more --shm-size"
        )


def class_names(root: Path) -> list[str]:
    """The sorted class folders that `root/train` and `root/val` have in common; they must not differ.

    Raises DataError that names the folder.
    """
    train, val = (set(folders_in(root / part)) for part in ("train", "val"))
    for name in sorted(train ^ val):
        there, missing = ("train", "val") if name in train else ("val", "train")
        raise DataError(
            f"{root / there / name}: this class folder is missing in {root / missing}; "
            "train/ and val/ need the same class folders"
        )
    return sorted(train)


def folders_in(folder: Path) -> list[str]:
    """The class folders in `folder`. Raises DataError if there are none."""
    try:
        entries = [e for e in os.scandir(folder) if not e.name.startswith(".")]
        names = [e.name for e in entries if e.is_dir()]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror}); data.root must hold train/CLASS/*.jpg and val/CLASS/*.jpg"
        ) from None
    if not names:
        raise DataError(f"{folder}: no class folders in it; images belong in {folder}/CLASS/")
    if loose := len(entries) - len(names):
        _log.warning("warning: %s: %d files next to the class folders are not read", folder, loose)
    return names


def images_in(folder: Path) -> list[str]:
    """The image files in a class folder and its subfolders, in sorted order, without hidden ones."""
    names, others, unfollowed = [], 0, 0
    seen = {os.path.realpath(folder)}

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None

    for path, subfolders, files in os.walk(folder, onerror=fail, followlinks=True):
        # Sorted, so that of two links to a folder every machine follows the same one.
        inner = sorted(name for name in subfolders if not name.startswith("."))
        subfolders[:] = []
        for name in inner:
            real = os.path.realpath(os.path.join(path, name))
            # A link to a folder above would read other classes as this one, or the same images for ever.
            if real in seen or os.path.realpath(folder).startswith(os.path.join(real, "")):
                unfollowed += 1
            else:
                seen.add(real)
                subfolders.append(name)
        inside = os.path.relpath(path, folder)
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                names.append(name if inside == "." else f"{inside}/{name}")
            else:
                others += 1
    if unfollowed:
        _log.warning(
            "warning: %s: %d links to a parent folder, or to one already read, are not followed", folder, unfollowed
        )
    if others:
        _log.warning("warning: %s: %d files are not read (known: %s)", folder, others, " ".join(SUFFIXES))
    if not names:
        raise DataError(f"{folder}: no images in this class folder (known: {' '.join(SUFFIXES)})")
    return sorted(names)
