"""Pictures from files: the random resized crop and the centre crop, all in uint8.

Working in uint8 and leaving the normalisation to the device is most of what makes this faster than the usual
chain through float tensors; decoding no more than the crop needs is the rest.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from largebatch.data.jpeg import Frame, decode_top, find_frame
from largebatch.data.settings import Augmentation
from largebatch.errors import DataError

_TRIES = 10
CROP_DRAWS = 2 * _TRIES + 3  # area and ratio of each try, top, left, flip

Box = tuple[int, int, int, int]  # top, left, height, width


class Picture(Protocol):
    """A picture whose size is known before its pixels are."""

    height: int
    width: int

    def top(self, rows: int) -> np.ndarray:
        """At least the uppermost `rows`: uint8 RGB [rows or more, W, 3]. Raises DataError."""
        ...


class ArrayPicture:
    """A picture that is decoded already: uint8 RGB [H, W, 3]."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def top(self, rows: int) -> np.ndarray:
        return self._pixels


class JpegPicture:
    """A JPEG file that is decoded when its pixels are asked for."""

    def __init__(self, path: str, data: bytes, frame: Frame) -> None:
        self.height, self.width = frame.height, frame.width
        self._path, self._data, self._frame = path, data, frame

    def top(self, rows: int) -> np.ndarray:
        try:
            return decode_top(self._data, self._frame, rows)
        except ValueError as error:
            raise _damaged(self._path, self._data, error) from None


def open_picture(path: str) -> Picture:
    """The picture in a file; grey, palette and CMYK pictures become RGB. Raises DataError naming the file."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend or remove the file") from None
    if frame := find_frame(data):
        return JpegPicture(path, data, frame)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return ArrayPicture(np.array(picture.convert("RGB")))
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _damaged(path, data, error) from None


def _damaged(path: str, data: bytes, error: Exception) -> DataError:
    no_image = isinstance(error, Image.UnidentifiedImageError)
    reason = "is no image" if no_image else f"is damaged ({error})"
    return DataError(f"{path}: {reason}, {len(data)} bytes; mend or remove the file")


def from_object(picture: Any) -> Picture:
    """A PIL image or a uint8 [C, H, W] tensor with 1 or 3 channels as a picture. Raises DataError."""
    if isinstance(picture, Image.Image):
        return ArrayPicture(np.array(picture.convert("RGB")))
    is_tensor = isinstance(picture, torch.Tensor)
    if is_tensor and picture.dtype == torch.uint8 and picture.ndim == 3 and picture.shape[0] in (1, 3):
        return ArrayPicture(picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    seen = f"{picture.dtype} {list(picture.shape)}" if is_tensor else type(picture).__name__
    raise DataError(f"a picture must be a PIL image or a uint8 tensor [1 or 3, H, W], not {seen}")


def random_crop(draws: Sequence[float], height: int, width: int, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """A random area and shape within the picture, distributed as torchvision's RandomResizedCrop.

    draws: CROP_DRAWS numbers in [0, 1).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for k in range(_TRIES):
        area = height * width * (scale[0] + draws[2 * k] * (scale[1] - scale[0]))
        shape = math.exp(low + draws[2 * k + 1] * (high - low))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[2 * _TRIES] * (height - h + 1))
            left = int(draws[2 * _TRIES + 1] * (width - w + 1))
            return top, left, h, w
    # No try fitted: the largest centre crop of an allowed shape.
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(picture: Picture, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """The box of a picture resized with antialiasing: uint8 [height, width, 3]."""
    top, left, height, width = box
    pixels = torch.from_numpy(picture.top(top + height))
    # Made 4-D before the axes are swapped: torch then knows it as channels_last and takes its fast kernel.
    crop = pixels[None].permute(0, 3, 1, 2)[:, :, top : top + height, left : left + width]
    resized = torch.nn.functional.interpolate(crop, size=size, mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1)[0]


def training_view(picture: Picture, draws: Sequence[float], size: int, how: Augmentation) -> torch.Tensor:
    """The random resized crop of a picture, mirrored half of the times: uint8 [size, size, 3]."""
    box = random_crop(draws, picture.height, picture.width, how.scale, how.ratio)
    view = resize(picture, box, (size, size))
    return view.flip(1) if how.flip and draws[CROP_DRAWS - 1] < 0.5 else view


def validation_view(picture: Picture, resize_size: int, size: int) -> torch.Tensor:
    """Short side resized to `resize_size`, then the centre: uint8 [size, size, 3]."""
    height, width = picture.height, picture.width
    short = min(height, width)
    target = (int(resize_size * height / short), int(resize_size * width / short))
    view = resize(picture, (0, 0, height, width), target)
    top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return view[top : top + size, left : left + size]
