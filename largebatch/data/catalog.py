"""What is known of a data set without looking at the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

from largebatch.data.settings import DataSettings
from largebatch.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SetFacts:
    """Sizes of a data set; `shape` is (channels, height, width), `mean` and `std` per channel in [0, 1]."""

    train_images: int
    val_images: int
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


_NAMES = {
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}


def class_names_of(settings: DataSettings) -> tuple[str, ...]:
    """The classes of a known set; empty where they are numbers."""
    return _NAMES.get(settings.name, ())


_KNOWN = {
    "fashion-mnist": SetFacts(60_000, 10_000, 10, (1, 28, 28), (0.2860,), (0.3530,)),
    "mnist": SetFacts(60_000, 10_000, 10, (1, 28, 28), (0.1307,), (0.3081,)),
    "cifar10": SetFacts(50_000, 10_000, 10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": SetFacts(1_437, 360, 10, (1, 8, 8), (0.2873,), (0.3542,)),
    "imagenet": SetFacts(1_281_167, 50_000, 1000, (3, 224, 224), IMAGENET_MEAN, IMAGENET_STD),
}


def whole_set(settings: DataSettings) -> SetFacts | None:
    """The facts of the set itself, before `train_images`, `val_images`, `mean` and `std` of the settings."""
    if settings.name == "synthetic":
        made = settings.synthetic
        channels, height, width = made.shape
        shape = (channels, height, width)
        middle, spread = (0.5,) * channels, (0.25,) * channels
        return SetFacts(made.train_images, made.val_images, made.classes, shape, middle, spread)
    known = _KNOWN.get(settings.name)
    if settings.name == "imagenet" and known is not None:
        return replace(known, shape=(3, settings.image_size, settings.image_size))
    return known


def known_set(settings: DataSettings) -> SetFacts | None:
    """The facts of what a run uses; None where only the disk knows (`imagefolder`, your own set).

    Raises ConfigError where `mean` or `std` do not fit the channels.
    """
    whole = whole_set(settings)
    if whole is None:
        return None
    mean, std = normalisation(settings, whole.shape[0], whole.mean, whole.std)
    return replace(
        whole,
        train_images=min(whole.train_images, settings.train_images or whole.train_images),
        val_images=min(whole.val_images, settings.val_images or whole.val_images),
        mean=mean,
        std=std,
    )


def normalisation(
    settings: DataSettings, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std for each channel: the settings' own where given, else the set's."""
    for key, values in (("mean", settings.mean), ("std", settings.std)):
        if values is not None and len(values) != channels:
            raise ConfigError(f"data.{key}: {len(values)} values for {channels} channels of {settings.name}")
    return tuple(settings.mean or mean), tuple(settings.std or std)
