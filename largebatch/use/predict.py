"""`largebatch predict`: the classes of image files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from largebatch.data.files import images_in
from largebatch.data.pictures import REMEDY, open_picture, validation_view
from largebatch.data.pixels import Normalise
from largebatch.errors import DataError, UserError
from largebatch.use.model import Trained
from largebatch.wording import reason

_TOGETHER = 64
_LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow makes gray of RGB


class Prediction(NamedTuple):
    """The likeliest classes of an image file, best first, with their probabilities; or why it cannot be read."""

    image: str
    classes: list[tuple[str, float]]
    problem: str = ""


def files_of(images: Sequence[Path]) -> Iterator[str]:
    """The image files, and those in the folders, that `images` name. Raises DataError for a folder without any."""
    for path in images:
        yield from ([str(path / name) for name in images_in(path)] if path.is_dir() else [str(path)])


def predict(trained: Trained, files: Iterable[str], *, top: int) -> Iterator[Prediction]:
    """The `top` classes of each file, in order; files are read as the run's validation images are."""
    names, mean, std = trained.inference.class_names, trained.inference.mean, trained.inference.std
    view = _View(trained.inference.shape, trained.inference.resize_size)
    normalise = Normalise(mean, std, trained.inference.shape, trained.device)
    remaining = iter(files)
    while chunk := list(itertools.islice(remaining, _TOGETHER)):
        views = [view.read(path) for path in chunk]
        good = [seen for seen in views if isinstance(seen, Tensor)]
        found: list[list[tuple[str, float]]] = []
        if good:
            probabilities = trained.probabilities(normalise(torch.stack(good).to(trained.device)))
            best = probabilities.topk(min(top, len(names)), dim=1)
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found = [[(names[i], share) for i, share in zip(*row, strict=True)] for row in rows]
        for path, seen in zip(chunk, views, strict=True):
            yield Prediction(path, [], seen) if isinstance(seen, str) else Prediction(path, found.pop(0))


class _View:
    """From an image file to what the model sees in validation."""

    def __init__(self, shape: tuple[int, int, int], resize_size: int | None) -> None:
        self._channels, self._height, self._width = shape
        self._resize_size = resize_size
        if self._channels not in (1, 3):
            raise UserError(f"the model takes images of {self._channels} channels, which no image file has")

    def read(self, path: str) -> Tensor | str:
        """uint8 [height, width, channels], or what is wrong with the file, which is named."""
        try:
            pixels = self._pixels(path)
        except DataError as error:
            return str(error).removesuffix(f"; {REMEDY}")
        except Exception as error:  # whatever a library does with a file
            return f"{path}: {reason(error)}"
        return pixels if self._channels == 3 else (pixels.float() @ _LUMA).round().to(torch.uint8)[..., None]

    def _pixels(self, path: str) -> Tensor:
        picture = open_picture(path)
        if self._resize_size is not None:
            return validation_view(picture, self._resize_size, self._height)
        # A set in memory: its images were never resized.
        if (picture.height, picture.width) == (self._height, self._width):
            return torch.from_numpy(picture.crop((0, 0, self._height, self._width)))
        if self._height == self._width:
            return validation_view(picture, self._height, self._height)
        raise DataError(
            f"{path}: is {picture.height} x {picture.width}, the model's are {self._height} x {self._width}"
        )
