"""The `data` section of a config: which images, and how they are augmented."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from largebatch.section import FolderName, FreeOnResume, Section

IN_MEMORY = ("fashion-mnist", "mnist", "cifar10", "digits", "synthetic")
FROM_FILES = ("imagefolder", "imagenet", "shards")
NAMES = (*IN_MEMORY, *FROM_FILES)

SIZES_OF_FILES = "val_image_size and progressive_resizing are for image files"

Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
PerChannel = Annotated[list[float], Field(min_length=1)]
Jitter = Annotated[list[Annotated[float, Field(ge=0, le=1000)]], Field(min_length=4, max_length=4)]
Stage = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=2, max_length=2)]
Channels = Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]


class Augmentation(Section):
    """What happens to a training image; validation images are never augmented."""

    kind: Literal["auto", "none", "crop", "resized_crop"] = "auto"
    """`crop`: zero padding, then a random window (sets in memory). `resized_crop`: a random area and shape
    resized to `data.image_size` (image files). `auto`: the one that suits the set."""

    padding: int = Field(default=4, ge=0)
    """`crop`: pixels of zero padding on each side."""

    flip: bool = True
    """Mirror half of the images; turn it off where left and right matter (digits)."""

    scale: Pair = Field(default=[0.08, 1.0])
    """`resized_crop`: smallest and largest share of the image's area."""

    ratio: Pair = Field(default=[3 / 4, 4 / 3])
    """`resized_crop`: smallest and largest width / height of the crop."""

    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    """torchvision's RandAugment (Cubuk et al. 2020) or TrivialAugmentWide (Müller and Hutter 2021), after the crop."""

    ra_num_ops: int = Field(default=2, ge=1, le=14)
    """`randaugment`: operations for each image."""

    ra_magnitude: int = Field(default=9, ge=0, le=30)
    """`randaugment`: their strength, of 30."""

    color_jitter: Jitter | None = None
    """Brightness, contrast, saturation and hue vary by as much as this, as in torchvision's ColorJitter; null for
    none."""

    random_erasing: float = Field(default=0.0, ge=0, le=1)
    """Probability that a box of the image is filled with the set's mean colour."""

    repeats: int = Field(default=1, ge=1, le=100)
    """Repeated augmentation: each image appears this many times per step, augmented separately for each virtual worker
    that gets a copy; an epoch has the same number of steps and that many times fewer images."""

    mixup_alpha: float = Field(default=0.0, ge=0, le=1000)
    """mixup: each virtual worker blends its images with one another, by a share drawn from Beta(alpha, alpha) in
    each step; 0 for none."""

    cutmix_alpha: float = Field(default=0.0, ge=0, le=1000)
    """CutMix: a box of another image of the virtual worker is pasted in, its area drawn likewise; 0 for none."""

    mixup_prob: float = Field(default=1.0, gt=0, le=1)
    """Probability that a virtual worker's images are mixed at all in a step."""

    mixup_switch_prob: float = Field(default=0.5, ge=0, le=1)
    """Where mixup and CutMix are both on: the probability of CutMix."""

    @model_validator(mode="after")
    def _ranges(self) -> Augmentation:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale}: needs 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio}: needs 0 < smallest <= largest")
        if self.color_jitter and self.color_jitter[3] > 0.5:
            raise ValueError(f"color_jitter {self.color_jitter}: the hue, the last value, is at most 0.5 (half a turn)")
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are blended with one another."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class Synthetic(Section):
    """Generated images: a faint pattern for each class under noise, the same on every machine."""

    shape: Channels = Field(default=[3, 32, 32])
    """Channels, height, width."""

    classes: int = Field(default=10, ge=2)
    """Number of classes."""

    train_images: PositiveInt = 4096
    """Number of training images."""

    val_images: PositiveInt = 1024
    """Number of validation images."""


class DataSettings(Section):
    """Which data set, where it is, and how it is read."""

    name: str = "fashion-mnist"
    """`fashion-mnist`, `mnist`, `cifar10`, `digits`, `imagefolder`, `imagenet`, `shards` (made by `largebatch data
    pack` or `data index`), `synthetic`, or `package.module:function` for your own, called with `arguments`; it returns
    (train, val)."""

    root: FreeOnResume[FolderName] = "data"
    """Folder that holds the data set; for `imagefolder`, `imagenet` and `shards` the one with `train/` and `val/`. `~`
    and `$NAME` are expanded."""

    augmentation: Augmentation = Augmentation()
    """How training images are varied."""

    image_size: PositiveInt = 224
    """Image files: height and width of the crop that the model sees."""

    progressive_resizing: list[Stage] = Field(default=[])
    """Image files, training: [epoch, pixels] in order; from that epoch on, counted from 0, the crop has so many pixels
    instead of `image_size`."""

    val_image_size: PositiveInt | None = None
    """Image files, validation: height and width of the centre crop; null: `image_size`."""

    resize_size: PositiveInt | None = None
    """Image files, validation: the short side is resized to this before the centre crop; null: in the proportion of 256
    to 224 to the crop."""

    mean: PerChannel | None = None
    """Mean of each channel in [0, 1], instead of the set's own."""

    std: PerChannel | None = None
    """Standard deviation of each channel in [0, 1], instead of the set's own."""

    loader_processes: FreeOnResume[int] = Field(default=2, ge=0)
    """Image files: decoding processes for each rank; 0 decodes in the training process."""

    prefetch: FreeOnResume[PositiveInt] = 4
    """Image files: passes that each loader process keeps ready."""

    on_error: FreeOnResume[Literal["stop", "skip"]] = "stop"
    """Image files that cannot be read: `stop`, naming the file; or `skip`, which takes the next good one in its place
    (the same on any number of ranks; in validation none), names each file once and counts."""

    on_change: FreeOnResume[Literal["refuse", "accept"]] = "refuse"
    """When a run is resumed or evaluated on other data than it was trained on (classes, file names or sizes): refuse,
    or accept; the results are then not comparable."""

    train_images: PositiveInt | None = None
    """Use only this many training images, for a quick run: the first ones, or evenly
    spaced ones of a folder (whose files are sorted by class)."""

    val_images: PositiveInt | None = None
    """Use only this many validation images, chosen in the same way."""

    classes: int | None = Field(default=None, ge=2)
    """Your own set: number of classes, if the data do not determine it."""

    multi_label: bool = False
    """Your own set: an image has any number of the classes, and its label is 0 or 1 for each of them."""

    synthetic: Synthetic = Synthetic()
    """What `name: synthetic` generates."""

    arguments: dict[str, Any] = Field(default={})
    """Keyword arguments for the function of your own set."""

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        if name in NAMES or ":" in name:
            return name
        nearest = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown set{hint} Known: {', '.join(NAMES)}, or 'package.module:function'")

    @model_validator(mode="after")
    def _combination(self) -> DataSettings:
        kind = self.augmentation.kind
        if kind == "resized_crop" and self.name in IN_MEMORY:
            raise ValueError(f"augmentation.kind {kind} is for image files; {self.name}: crop or none")
        if kind == "crop" and self.name in FROM_FILES:
            raise ValueError(f"augmentation.kind {kind} is for sets in memory; {self.name}: resized_crop or none")
        if self.multi_label and ":" not in self.name:
            raise ValueError(f"multi_label is for a set of your own; {self.name} has one class for each image")
        if self.name in IN_MEMORY and self.other_sizes:
            raise ValueError(f"{SIZES_OF_FILES}; {self.name} has images of one size")
        if self.short_side < self.val_size:
            key = "val_image_size" if self.val_image_size else "image_size"
            raise ValueError(f"resize_size {self.resize_size} is less than {key} {self.val_size}")
        epochs = [epoch for epoch, _ in self.progressive_resizing]
        if epochs != sorted(set(epochs)) or any(size < 1 for _, size in self.progressive_resizing):
            raise ValueError(
                f"progressive_resizing {self.progressive_resizing}: needs [epoch, pixels] with growing epochs and at "
                "least 1 pixel"
            )
        for key, values, smallest in (("mean", self.mean, 0.0), ("std", self.std, 1e-6)):
            if any(not smallest <= value <= 1 for value in values or []):
                raise ValueError(
                    f"{key} {values}: every value must be in [0, 1], as of pixels divided by 255"
                    + (" and above 0" if key == "std" else "")
                )
        return self

    @property
    def val_size(self) -> int:
        """Height and width of a validation image."""
        return self.val_image_size or self.image_size

    @property
    def short_side(self) -> int:
        """Pixels of a validation image's short side before the centre crop."""
        return self.short_side_of(self.val_size)

    def short_side_of(self, size: int) -> int:
        """The same before a centre crop of another `size`: without augmentation, training images have one too."""
        return self.resize_size if self.resize_size and size == self.val_size else round(size * 256 / 224)

    def train_size(self, epoch: int) -> int:
        """Height and width of a training image in `epoch`."""
        return next((size for start, size in reversed(self.progressive_resizing) if epoch >= start), self.image_size)

    @property
    def other_sizes(self) -> list[int]:
        """All that a model sees beside `image_size`."""
        return sorted({self.val_size, *(size for _, size in self.progressive_resizing)} - {self.image_size})

    @property
    def largest_train_size(self) -> int:
        return max([self.image_size, *(size for _, size in self.progressive_resizing)])

    @property
    def of_one_size(self) -> DataSettings:
        """The same without progressive resizing, for what measures a few steps only."""
        return self.model_copy(update={"progressive_resizing": []})
