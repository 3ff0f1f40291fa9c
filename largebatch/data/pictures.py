"""Pictures from files: decoding, the random resized crop and the centre crop, all in uint8.

Working in uint8 and leaving the normalisation to the device is what makes this several times as fast as the
usual chain through float tensors.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from largebatch.data.settings import Augmentation
from largebatch.errors import DataError

try:
    import simplejpeg
except ImportError:  # Pillow decodes to the same pixels, in more time.
    simplejpeg = None

_TRIES = 10
CROP_DRAWS = 2 * _TRIES + 3  # area and ratio of each try, top, left, flip

Box = tuple[int, int, int, int]  # top, left, height, width


def decode_file(path: str) -> np.ndarray:
    """The picture in a file as uint8 RGB [H, W, 3]. Raises DataError that names the file."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend or remove the file") from None
    try:
        return decode(data)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "is no image" if isinstance(error, Image.UnidentifiedImageError) else f"is damaged ({error})"
        raise DataError(f"{path}: {reason}, {len(data)} bytes; mend or remove the file") from None


def decode(data: bytes) -> np.ndarray:
    """uint8 RGB [H, W, 3] of an encoded picture; grey, palette and CMYK pictures become RGB."""
    if simplejpeg is not None and data.startswith(b"\xff\xd8"):
        colours = simplejpeg.decode_jpeg_header(data)[2]
        if colours not in ("CMYK", "YCCK"):
            return simplejpeg.decode_jpeg(data)
    with Image.open(io.BytesIO(data)) as picture:
        return np.array(picture.convert("RGB"))


def as_rgb(picture: Any) -> np.ndarray:
    """uint8 [H, W, 3] of a PIL image or a uint8 [C, H, W] tensor with 1 or 3 channels."""
    if isinstance(picture, Image.Image):
        return np.array(picture.convert("RGB"))
    is_tensor = isinstance(picture, torch.Tensor)
    if is_tensor and picture.dtype == torch.uint8 and picture.ndim == 3 and picture.shape[0] in (1, 3):
        return picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
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


def resize(pixels: np.ndarray, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """The box of a picture [H, W, 3] resized with antialiasing to uint8 [height, width, 3]."""
    top, left, height, width = box
    # Made 4-D before the axes are swapped: torch then knows it as channels_last and takes its fast kernel.
    crop = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)[:, :, top : top + height, left : left + width]
    resized = torch.nn.functional.interpolate(crop, size=size, mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1)[0]


def training_view(pixels: np.ndarray, draws: Sequence[float], size: int, how: Augmentation) -> torch.Tensor:
    """The random resized crop of a picture [H, W, 3], mirrored half of the times: uint8 [size, size, 3]."""
    height, width = pixels.shape[:2]
    view = resize(pixels, random_crop(draws, height, width, how.scale, how.ratio), (size, size))
    return view.flip(1) if how.flip and draws[CROP_DRAWS - 1] < 0.5 else view


def validation_view(pixels: np.ndarray, resize_size: int, size: int) -> torch.Tensor:
    """Short side resized to `resize_size`, then the centre: uint8 [size, size, 3]."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    target = (int(resize_size * height / short), int(resize_size * width / short))
    view = resize(pixels, (0, 0, height, width), target)
    top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return view[top : top + size, left : left + size]
