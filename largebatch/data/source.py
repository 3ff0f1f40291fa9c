"""What the trainer asks for and what every data set gives."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

Batches = Generator[tuple[Tensor, Tensor], None, None]
"""Images (float32 [n, C, H, W], normalised, on the device) and labels (int64 [n]); `close` it when done."""


class Pass(NamedTuple):
    """The images that go through the model together: int64 indices into the set."""

    epoch: int
    indices: np.ndarray


class ImageSource(Protocol):
    """A data set that yields normalised images on the device.

    `images` is their number, `shape` is (channels, height, width).
    """

    images: int
    classes: int
    shape: tuple[int, int, int]
    leaves_out: bool
    """Whether an image that cannot be read is left out of its pass (a validation set, `data.on_error: skip`)."""
    skipped: int
    """Pictures in whose place another was given so far, in this process (`data.on_error: skip`)."""

    def fingerprint(self) -> str:
        """A hash of what the set holds and in which order, as far as it can be told without reading every file."""
        ...

    def stream(self, passes: Iterable[Pass], *, augment: bool) -> Batches:
        """One (float32 [n, C, H, W], int64 [n]) for each pass, in order; `passes` may be endless.

        With `augment`, the pixels of an image depend on (seed, epoch, its index) and on nothing else.
        Closing the iterator stops the loader processes. Raises DataError, naming the file.
        """
        ...
