"""A data set of the user's own, by import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from largebatch.data.known import Split
from largebatch.data.pictures import check_many, describe
from largebatch.data.settings import DataSettings
from largebatch.errors import DataError, UserError
from largebatch.wording import reason

PARTS = ("training set", "validation set")
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)


def call_own(settings: DataSettings) -> tuple[Any, Any]:
    """(train, val) as the function `package.module:function` returns them for `arguments`.

    Raises DataError that names the path and says what is wrong.
    """
    function = _function(settings.name)
    try:
        inspect.signature(function).bind(**settings.arguments)
    except TypeError as error:
        raise DataError(
            f"data.arguments: {settings.name} cannot be called with {settings.arguments}: {error}; overrides add to "
            "the arguments of the file, they do not replace them"
        ) from None
    try:
        result = function(**settings.arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"data.name {settings.name}: raised {reason(error)}") from error
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise DataError(f"data.name {settings.name}: must return (train, val), not {describe(result)}")
    where = [f"data.name {settings.name}, {part}" for part in PARTS]
    train, val = map(_as_tensors, result, where)
    return train, val


def _as_tensors(split: Any, where: str) -> Any:
    """(images, labels) as tensors where one of them is an array; anything else as it is.

    Raises DataError where an array, or a list next to one, does not hold numbers.
    """
    pair = isinstance(split, tuple | list) and len(split) == 2
    if not (pair and any(isinstance(part, np.ndarray | Tensor) for part in split)):
        return split
    return tuple(_as_tensor(part, f"{where}: {what}") for part, what in zip(split, ("images", "labels"), strict=True))


def _as_tensor(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        # A copy, in this machine's byte order: an array may be read-only or run backwards.
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError):
        kind = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else describe(values)
        raise DataError(f"{what} must be numbers in a tensor or a NumPy array, not {kind}") from None


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"data.name {path}: cannot be imported ({error}); the form is package.module:function, and the "
            "package must be installed or its folder be in PYTHONPATH"
        ) from None
    if not callable(found):
        raise DataError(f"data.name {path}: is a {type(found).__name__}, not a function")
    return found


def is_tensors(split: Any) -> bool:
    """Whether a split is (images, labels) as tensors, rather than a dataset."""
    return isinstance(split, tuple) and len(split) == 2 and all(isinstance(part, Tensor) for part in split)


def check_tensors(split: Split, where: str, classes: int, *, multi_label: bool = False) -> Split:
    """The split, if it is uint8 [M, C, H, W] and integer labels [M] in 0..classes-1; DataError otherwise.

    With `multi_label`, labels are 0 or 1, [M, classes], and become float32.
    """
    images, labels = split
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise DataError(f"{where}: images must be uint8 [M, C, H, W], not {_kind(images)}")
    if images.shape[1] > 4 >= images.shape[3]:
        raise DataError(
            f"{where}: images are {_kind(images)}, which looks like [M, H, W, C]; give [M, C, H, W] "
            "(images.permute(0, 3, 1, 2))"
        )
    if multi_label:
        return images, check_many(labels, [len(images), classes], where)
    if labels.dtype not in _INTEGERS or labels.shape != images.shape[:1]:
        hint = "; for any number of classes for each image set data.multi_label" if labels.ndim == 2 else ""
        raise DataError(f"{where}: labels must be integers [{len(images)}], not {_kind(labels)}{hint}")
    labels = labels.to(torch.int64)
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        index = int(outside[0])
        raise DataError(
            f"{where}, image {index}: label {int(labels[index])} is outside 0..{classes - 1}; "
            "correct the label or set data.classes"
        )
    return images, labels


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def own_classes(train: Any, settings: DataSettings) -> int:
    """The number of classes: `data.classes`, else what the training set says of itself. Raises DataError."""
    if settings.classes is not None:
        return settings.classes
    where = f"data.name {settings.name}"
    if is_tensors(train):
        labels = train[1]
        if settings.multi_label and labels.ndim == 2:
            return labels.shape[1]
        if not len(labels) or labels.dtype not in _INTEGERS or (labels.to(torch.int64) < 0).any():
            return 2  # `check_tensors` refuses them, with what they are
        found = int(labels.to(torch.int64).max()) + 1
    else:
        names = getattr(train, "classes", None)
        if names is None or not hasattr(names, "__len__"):
            raise DataError(f"{where}: its dataset has no list `classes`; set data.classes")
        found = len(names)
    if found < 2:
        raise DataError(f"{where}: {found} class only; a classifier needs at least two (or set data.classes)")
    return found
