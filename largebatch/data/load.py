"""From the `data` section to the two sources that a run reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from largebatch.data.catalog import IMAGENET_MEAN, IMAGENET_STD, class_names_of, normalisation, whole_set
from largebatch.data.files import DatasetPictures, FolderPictures, Pictures, PictureSource, class_names, folders_in
from largebatch.data.known import Split, read_known
from largebatch.data.memory import MemorySource
from largebatch.data.operations import make_operations
from largebatch.data.own import PARTS, call_own, check_tensors, is_tensors, own_classes
from largebatch.data.pictures import describe
from largebatch.data.settings import FROM_FILES, SIZES_OF_FILES, DataSettings
from largebatch.data.shards import ShardPictures
from largebatch.data.source import ImageSource
from largebatch.data.synthetic import make_split
from largebatch.errors import ConfigError, DataError
from largebatch.wording import did_you_mean, some

Sources = tuple[ImageSource, ImageSource]


def load(settings: DataSettings, *, seed: int, device: torch.device) -> Sources:
    """(train, val) of the set that `settings` name. Reads only, so that many ranks may do it at once.

    Raises DataError where data is missing, damaged or not as it should be, naming the file and the remedy.
    """
    if ":" in settings.name:
        return _own(settings, seed, device)
    if settings.name == "shards":
        return _shards(settings, seed, device)
    if settings.name in FROM_FILES:
        return _folder(settings, seed, device)
    if settings.name == "synthetic":
        made = settings.synthetic
        train = make_split(made, seed=seed, part=0, images=made.train_images)
        val = make_split(made, seed=seed, part=1, images=made.val_images)
    else:
        train, val = read_known(settings.name, Path(settings.root))
    whole = whole_set(settings)
    assert whole is not None
    return _in_memory(settings, train, val, whole.classes, (whole.mean, whole.std), seed, device)


def _in_memory(
    settings: DataSettings,
    train: Split,
    val: Split,
    classes: int,
    own: tuple[tuple[float, ...], tuple[float, ...]],
    seed: int,
    device: torch.device,
) -> Sources:
    mean, std = normalisation(settings, train[0].shape[1], *own)
    how = settings.augmentation
    if how.kind == "resized_crop":
        raise ConfigError("data.augmentation.kind: resized_crop is for image files; here: crop or none")
    if settings.other_sizes:
        raise ConfigError(f"data: {SIZES_OF_FILES}; {settings.name} has images of one size")
    if train[0].shape[1] not in (1, 3) and (how.auto_augment != "none" or how.color_jitter):
        raise ConfigError(
            "data.augmentation: auto_augment and color_jitter are for images of 1 or 3 channels, and these have "
            f"{train[0].shape[1]}; leave them at none and null"
        )
    padding, flip = (0, False) if how.kind == "none" else (how.padding, how.flip)

    def source(split: Split, limit: int | None, **augmentation: Any) -> MemorySource:
        images, labels = split[0][:limit], split[1][:limit]
        return MemorySource(
            images,
            labels,
            classes=classes,
            class_names=class_names_of(settings),
            mean=mean,
            std=std,
            device=device,
            **augmentation,
        )

    operations = make_operations(how, mean=mean, seed=seed)
    varied = source(
        train, settings.train_images, padding=padding, flip=flip, operations=operations, repeats=how.repeats, seed=seed
    )
    return varied, source(val, settings.val_images)


def _folder(settings: DataSettings, seed: int, device: torch.device) -> Sources:
    root = Path(settings.root)
    classes = class_names(root)
    if len(classes) < 2:
        raise DataError(
            f"{root / 'train'}: only one class folder ({classes[0]}); a classifier needs at least two, each a folder"
        )
    train = FolderPictures(root / "train", classes, settings.train_images)
    val = FolderPictures(root / "val", classes, settings.val_images)
    _check_counts(settings, train, val)
    return _pictures(settings, train, val, (IMAGENET_MEAN, IMAGENET_STD), seed, device)


def _shards(settings: DataSettings, seed: int, device: torch.device) -> Sources:
    root = Path(settings.root)
    train = ShardPictures(root / "train", settings.train_images)
    val = ShardPictures(root / "val", settings.val_images)
    if train.class_names != val.class_names:
        raise DataError(f"{root}: train/ and val/ have different classes; pack or index both from one set")
    return _pictures(settings, train, val, (IMAGENET_MEAN, IMAGENET_STD), seed, device)


def load_folder(
    settings: DataSettings,
    folder: Path,
    names: Sequence[str],
    normalisation: tuple[Sequence[float], Sequence[float]],
    *,
    seed: int,
    device: torch.device,
) -> ImageSource:
    """The image files of `folder`/CLASS as validation images for a model whose outputs mean `names`; of these, the
    folder may have some. `normalisation` is mean and std. Raises DataError if it has others."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one that holds CLASS/*.jpg")
    found = sorted(folders_in(folder))
    unknown = [name for name in found if name not in names]
    if unknown:
        raise DataError(
            f"{folder}: the model has no class {some(unknown)}{did_you_mean(unknown[0], names)}; its folders must be "
            "named as the model's classes"
        )
    mean, std = normalisation
    pictures = FolderPictures(folder, found, of=names)
    return PictureSource(pictures, settings, mean=mean, std=std, seed=seed, device=device, validates=True)


def _check_counts(settings: DataSettings, train: Pictures, val: Pictures) -> None:
    """ImageNet's plan is made from known numbers: the disk must agree."""
    whole = whole_set(settings)
    if whole is None:
        return
    for part, found, images in (("train", train, whole.train_images), ("val", val, whole.val_images)):
        limit = settings.train_images if part == "train" else settings.val_images
        expected = min(images, limit or images)
        if len(found) != expected or found.classes != whole.classes:
            raise DataError(
                f"{settings.root}/{part}: {len(found)} files in {found.classes} classes, but {settings.name} "
                f"has {expected} in {whole.classes}; for another set of this layout use name: imagefolder"
            )


def _own(settings: DataSettings, seed: int, device: torch.device) -> Sources:
    splits = call_own(settings)
    where = [f"data.name {settings.name}, {part}" for part in PARTS]
    if all(is_tensors(split) for split in splits):
        classes = own_classes(splits[0], settings)
        many = settings.multi_label
        train, val = (check_tensors(s, w, classes, multi_label=many) for s, w in zip(splits, where, strict=True))
        seen, expected = list(val[0].shape[1:]), list(train[0].shape[1:])
        if seen != expected:
            raise DataError(f"{where[1]}: images are {seen}, but training images {expected}")
        own = ((0.5,) * expected[0], (0.25,) * expected[0])
        return _in_memory(settings, train, val, classes, own, seed, device)
    if any(is_tensors(s) or not (hasattr(s, "__getitem__") and hasattr(s, "__len__")) for s in splits):
        raise DataError(
            f"data.name {settings.name}: returned {' and '.join(map(describe, splits))}; both parts must be (uint8 "
            "images, integer labels) or both a dataset with __len__ and __getitem__"
        )
    classes = own_classes(splits[0], settings)
    limits = (settings.train_images, settings.val_images)
    many = settings.multi_label
    pictures = [DatasetPictures(s, classes, w, n, many) for s, w, n in zip(splits, where, limits, strict=True)]
    return _pictures(settings, pictures[0], pictures[1], ((0.5,) * 3, (0.25,) * 3), seed, device)


def _pictures(
    settings: DataSettings,
    train: Pictures,
    val: Pictures,
    own: tuple[tuple[float, ...], tuple[float, ...]],
    seed: int,
    device: torch.device,
) -> Sources:
    if settings.augmentation.kind == "crop":
        raise ConfigError("data.augmentation.kind: crop is for sets in memory; here: resized_crop or none")
    mean, std = normalisation(settings, 3, *own)

    def source(pictures: Pictures, *, validates: bool) -> PictureSource:
        return PictureSource(pictures, settings, mean=mean, std=std, seed=seed, device=device, validates=validates)

    return source(train, validates=False), source(val, validates=True)
