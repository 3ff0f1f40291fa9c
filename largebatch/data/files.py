"""Pictures that are too many for memory: decoded in loader processes as they are needed."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from largebatch.data.pictures import (
    CROP_DRAWS,
    Picture,
    from_object,
    open_picture,
    training_view,
    validation_view,
)
from largebatch.data.pixels import Normalise, image_draws
from largebatch.data.settings import DataSettings
from largebatch.data.source import Batches, Pass
from largebatch.errors import DataError
from largebatch.wording import reason

_log = logging.getLogger(__name__)
_SKIPPED_IN_A_ROW = 100  # more is no bad picture, but a disk that is gone
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class Pictures(Protocol):
    """Numbered pictures with labels; pickled to the loader processes."""

    classes: int

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`."""
        ...

    def picture(self, index: int) -> tuple[Picture, int]:
        """A picture and its label. Raises DataError, naming the file."""
        ...


class FolderPictures:
    """`folder/CLASS/*.jpg`, in sorted order, so that every machine numbers the files alike."""

    def __init__(self, folder: Path, classes: Sequence[str], limit: int | None = None) -> None:
        names = [_images_in(folder / name) for name in classes]
        # Bytes in one array, not a list of strings: 1.3 million of these are copied to every loader process.
        files = [os.fsencode(f"{c}/{n}") for c, found in zip(classes, names, strict=True) for n in found]
        labels = np.repeat(np.arange(len(classes)), [len(found) for found in names])
        count = min(limit or len(files), len(files))
        chosen = np.arange(count) * len(files) // count
        self.classes = len(classes)
        self._folder = str(folder)
        self._files, self._labels = np.array(files)[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self._files)

    def fingerprint(self) -> str:
        """Of the files' names, which hold the class; their bytes would take hours."""
        return hashlib.sha256(b"\n".join(self._files.tolist())).hexdigest()

    def picture(self, index: int) -> tuple[Picture, int]:
        path = os.path.join(self._folder, os.fsdecode(self._files[index]))
        return open_picture(path), int(self._labels[index])


class DatasetPictures:
    """A map-style dataset of your own, giving (PIL image or uint8 [C, H, W] tensor, label)."""

    def __init__(self, dataset: Any, classes: int, where: str, limit: int | None = None) -> None:
        if len(dataset) == 0:
            raise DataError(f"{where}: the dataset has no images")
        self.classes = classes
        self._dataset, self._where = dataset, where
        self._count = min(limit or len(dataset), len(dataset))

    def __len__(self) -> int:
        return self._count

    def fingerprint(self) -> str:
        """Of the number of images alone: all else is the dataset's own."""
        return str(self._count)

    def picture(self, index: int) -> tuple[Picture, int]:
        try:
            picture, label = self._dataset[index]
        except Exception as error:
            raise DataError(f"{self._where}, image {index}: {reason(error)}") from error
        if not 0 <= label < self.classes:
            raise DataError(
                f"{self._where}, image {index}: label {label} is outside 0..{self.classes - 1}; "
                "mend the label or set data.classes"
            )
        try:
            return from_object(picture), int(label)
        except DataError as error:
            raise DataError(f"{self._where}, image {index}: {error}") from None


class Decoded(NamedTuple):
    """A pass as it leaves a loader process."""

    images: Tensor
    """uint8 [n, size, size, 3]"""
    labels: Tensor
    """int64 [n]"""
    skipped: list[str]
    """What was wrong with each picture that another stands in for."""


class Decoder:
    """What a loader process runs: a pass in, its pictures out."""

    def __init__(self, pictures: Pictures, settings: DataSettings, seed: int, augment: bool) -> None:
        self._pictures, self._settings, self._seed = pictures, settings, seed
        self._augment = augment and settings.augmentation.kind != "none"

    def __getitem__(self, requested: Pass) -> Decoded | DataError:
        try:
            return self._decode(requested)
        except DataError as error:
            # Handed over, not raised: DataLoader would wrap the message in the process's traceback.
            return error

    def _decode(self, requested: Pass) -> Decoded:
        size, skipped = self._settings.image_size, list[str]()
        images = torch.empty(len(requested.indices), size, size, 3, dtype=torch.uint8)
        labels = torch.empty(len(requested.indices), dtype=torch.int64)
        draws = image_draws(requested.indices, CROP_DRAWS, seed=self._seed, epoch=requested.epoch).tolist()
        for row, index in enumerate(requested.indices.tolist()):
            images[row], labels[row] = self._good_view(index, draws[row], skipped)
        return Decoded(images, labels, skipped)

    def _good_view(self, index: int, draws: Sequence[float], skipped: list[str]) -> tuple[Tensor, int]:
        """A picture as the model sees it, and its label; if it may be skipped, of the next good one."""
        if self._settings.on_error == "stop":
            return self._view(index, draws)
        for candidate in range(index, index + _SKIPPED_IN_A_ROW):
            try:
                return self._view(candidate % len(self._pictures), draws)
            except DataError as error:
                skipped.append(str(error))
        raise DataError(f"{skipped[-1]} ({_SKIPPED_IN_A_ROW} pictures in a row cannot be used, so none is skipped)")

    def _view(self, index: int, draws: Sequence[float]) -> tuple[Tensor, int]:
        settings = self._settings
        picture, label = self._pictures.picture(index)
        if self._augment:
            return training_view(picture, draws, settings.image_size, settings.augmentation), label
        return validation_view(picture, settings.resize_size, settings.image_size), label


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
    ) -> None:
        self.images, self.classes = len(pictures), pictures.classes
        self.shape = (3, settings.image_size, settings.image_size)
        self._pictures, self._settings, self._seed, self._device = pictures, settings, seed, device
        self._normalise = Normalise(mean, std, self.shape, device)
        self.skipped = 0
        self._known_bad: set[str] = set()

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`."""
        return self._pictures.fingerprint()

    def stream(self, passes: Iterable[Pass], *, augment: bool) -> Batches:
        """See `ImageSource.stream`."""
        batches = iter(self._loader(passes, augment))
        try:
            while (batch := _next(batches)) is not None:
                if isinstance(batch, DataError):
                    raise batch
                self._count(batch.skipped)
                images, labels = (part.to(self._device, non_blocking=True) for part in (batch.images, batch.labels))
                yield self._normalise(images), labels
        finally:
            del batches  # ends the loader processes

    def _count(self, skipped: list[str]) -> None:
        """Count the pictures that were skipped, and name each of them once."""
        self.skipped += len(skipped)
        for problem in sorted(set(skipped) - self._known_bad):
            _log.warning("warning: %s; the next good picture stands in for it (data.on_error: skip)", problem)
        self._known_bad.update(skipped)

    def _loader(self, passes: Iterable[Pass], augment: bool) -> DataLoader:
        processes = self._settings.loader_processes
        return DataLoader(
            Decoder(self._pictures, self._settings, self._seed, augment),  # type: ignore[arg-type]
            sampler=passes,
            batch_size=None,
            num_workers=processes,
            prefetch_factor=self._settings.prefetch if processes else None,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else DataLoader takes a number from torch's global generator
        )


def _next(batches: Iterator[Any]) -> Decoded | DataError | None:
    """The next batch, None after the last, or what went wrong.

    Returned and not raised here: a traceback would hold on to `batches`, and that to the loader processes.
    """
    try:
        return next(batches, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return DataError(
            f"a loader process died ({str(error).splitlines()[0]}); often too little memory or shared "
            "memory: lower data.loader_processes or data.prefetch, or give the container more --shm-size"
        )


def class_names(root: Path) -> list[str]:
    """The sorted class folders that `root/train` and `root/val` have in common; they must not differ.

    Raises DataError that names the folder.
    """
    train, val = (set(_folders_in(root / part)) for part in ("train", "val"))
    for name in sorted(train ^ val):
        there, missing = ("train", "val") if name in train else ("val", "train")
        raise DataError(
            f"{root / there / name}: this class folder is missing in {root / missing}; "
            "train/ and val/ need the same class folders"
        )
    return sorted(train)


def _folders_in(folder: Path) -> list[str]:
    try:
        names = [e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror}); data.root must hold train/CLASS/*.jpg and val/CLASS/*.jpg"
        ) from None
    if not names:
        raise DataError(f"{folder}: no class folders in it; images belong in {folder}/CLASS/")
    return names


def _images_in(folder: Path) -> list[str]:
    try:
        names = sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(_SUFFIXES))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    if not names:
        raise DataError(f"{folder}: no images in this class folder (known: {' '.join(_SUFFIXES)})")
    return names
