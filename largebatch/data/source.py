"""What the trainer asks for and what every data set gives."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from largebatch.wording import some

Batches = Generator[tuple[Tensor, Tensor], None, None]
"""Images (float32 [n, C, H, W], normalised, on the device) and labels (int64 [n], or with `data.multi_label` 0 and 1,
float32 [n, classes]); `close` it when done."""


class Pass(NamedTuple):
    """The images that go through the model together: int64 indices into the set, or of copies (see `EpochOrder`)."""

    epoch: int
    indices: np.ndarray


class ImageSource(Protocol):
    """A data set that yields normalised images on the device.

    `images` is their number, `shape` is (channels, height, width).
    """

    images: int
    classes: int
    class_names: tuple[str, ...]
    """What each output of a model means, in order."""
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of each channel in [0, 1], as images are normalised by."""
    resize_size: int | None
    """Pixels of a validation image's short side before the centre crop; None for images in memory, never resized."""
    leaves_out: bool
    """Whether an image that cannot be read is left out of its pass (a validation set, `data.on_error: skip`)."""
    skipped: int
    """Pictures in whose place another was given so far, in this process (`data.on_error: skip`)."""

    def fingerprint(self) -> str:
        """A hash of what the set holds and in which order, as far as is known without reading every file."""
        ...

    def listing(self) -> str:
        """What the fingerprint is of, for messages: a line for each file, or each class if they are many; or empty."""
        ...

    def stream(self, passes: Iterable[Pass], *, augment: bool) -> Batches:
        """One (float32 [n, C, H, W], int64 [n]) for each pass, in order; `passes` may be endless.

        With `augment`, the pixels of an image depend on (seed, epoch, its index) and on nothing else.
        Closing the iterator stops the loader processes. Raises DataError, naming the file.
        """
        ...


def describe(source: ImageSource) -> dict[str, Any]:
    """What tells a data set from another: plain values for checkpoints and run folders."""
    found = {"images": source.images, "class_names": list(source.class_names), "fingerprint": source.fingerprint()}
    listing = source.listing()
    return found | ({"listing": listing} if listing else {})


def changes(before: dict[str, Any], now: dict[str, Any], part: str) -> str:
    """What is different about the `part` that `describe` described twice, in words; empty if nothing is."""
    if before["class_names"] != now["class_names"]:
        old, new = before["class_names"], now["class_names"]
        odd = next(
            (i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), min(len(old), len(new))
        )
        names = [repr(names[odd]) if odd < len(names) else "none" for names in (old, new)]
        return f"the {part} has different classes: number {odd} was {names[0]}, now {names[1]}"
    if before["fingerprint"] == now["fingerprint"]:
        return ""
    named = _changed_files(before.get("listing", ""), now.get("listing", ""))
    if before["images"] != now["images"]:
        return f"the {part} had {before['images']} images, now {now['images']}" + f" ({named})" * bool(named)
    return f"files of the {part} have different names or sizes" + f": {named}" * bool(named)


def _changed_files(before: str, now: str) -> str:
    """The first lines of `ImageSource.listing` that differ, in words; empty if either is."""
    if not before or not now:
        return ""
    old, new = (dict(line.rsplit(" ", 1) for line in text.splitlines()) for text in (before, now))
    odd = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return some([f"{n} {'is new' if n not in old else 'is gone' if n not in new else 'has changed'}" for n in odd])
