"""Image files: the random resized crop and the centre crop, all in uint8.

Working in uint8 and leaving the normalisation to the device is most of what makes this faster than the usual
chain through float tensors; decoding no more than the crop needs is the rest.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from largebatch.data.jpeg import Box, Frame, decode_box, find_frame
from largebatch.data.settings import Augmentation
from largebatch.errors import DataError

_TRIES = 10
_LONG = 32  # long over short side from which on a picture is cut to its middle before it is resized
_MOST_PIXELS = 2**28  # 0.8 GB once decoded
_BAND_PIXELS = (
    2**24
)  # Pillow's pixels of a large image become ours in bands: a copy of the whole would double its memory
# Named, since Pillow would start Ghostscript for a PostScript file, whatever its suffix.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "AVIF")
_BITS, _WHITE_IS_ZERO, _NUMBERS = 258, 262, 339  # TIFF tags: BitsPerSample, PhotometricInterpretation, SampleFormat
_UNSIGNED = (1, 4)  # values of SampleFormat; 4 is undefined
REMEDY = "replace the file, or set data.on_error=skip"
CROP_DRAWS = 2 * _TRIES + 3  # area and ratio of each try, top, left, flip


class Picture(Protocol):
    """A picture whose size is known before its pixels are."""

    height: int
    width: int

    def crop(self, box: Box) -> np.ndarray:
        """A part: uint8 RGB [height, width, 3], perhaps a view. Raises DataError."""
        ...


class ArrayPicture:
    """A picture that is decoded already: uint8 RGB [H, W, 3]."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def crop(self, box: Box) -> np.ndarray:
        top, left, height, width = box
        return self._pixels[top : top + height, left : left + width]


class JpegPicture:
    """A JPEG file that is decoded when its pixels are asked for."""

    def __init__(self, path: str, data: bytes, frame: Frame) -> None:
        self.height, self.width = frame.height, frame.width
        self._path, self._data, self._frame = path, data, frame

    def crop(self, box: Box) -> np.ndarray:
        try:
            return decode_box(self._data, self._frame, box)
        except ValueError:
            # libjpeg warns of what most programs accept (odd headers, stray bytes). What is damaged Pillow decides, on
            # machines with and without simplejpeg alike.
            return ArrayPicture(_decode(self._path, self._data)).crop(box)


def open_picture(path: str) -> Picture:
    """The picture in a file; grey, palette and CMYK pictures become RGB. Raises DataError naming the file."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
    return picture_from(path, data)


def picture_from(path: str, data: bytes) -> Picture:
    """The picture in the content of a file that messages call `path`. Raises DataError naming it."""
    if frame := find_frame(data):
        try:
            _check_size(frame.width, frame.height)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        return JpegPicture(path, data, frame)
    return ArrayPicture(_decode(path, data))


def _decode(path: str, data: bytes) -> np.ndarray:
    """The whole picture by Pillow: uint8 RGB [H, W, 3]. Raises DataError naming the file."""
    try:
        with _lenient_pillow(), Image.open(io.BytesIO(data), formats=_formats()) as picture:
            _check_size(*picture.size)
            return to_rgb(picture)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise _damaged(path, data, error) from None


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # not every Pillow has AVIF


@contextlib.contextmanager
def _lenient_pillow() -> Iterator[None]:
    """Inside, Pillow neither warns (of odd EXIF, of transparency) nor refuses large images and long texts in a PNG.

    The limit on the size is ours, the same for all formats and decoders.
    """
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PngImagePlugin.MAX_TEXT_MEMORY
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = before


def _check_size(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise DataError(f"{width} x {height} pixels are more than {_MOST_PIXELS:,}, too many to decode; scale it down")


def to_rgb(picture: Image.Image) -> np.ndarray:
    """The first frame of a PIL image as uint8 RGB [H, W, 3]; 16 bits are scaled to 8. Raises DataError.

    Transparency is dropped, and EXIF's rotation ignored, as torchvision does.
    """
    mode, tags = picture.mode, getattr(picture, "tag_v2", {})
    if mode == "F":
        raise _without_range("floats")
    if any(number not in _UNSIGNED for number in _as_tuple(tags.get(_NUMBERS, 1))):
        raise _without_range("signed numbers")
    if mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM")):
        largest = 2 ** _as_tuple(tags.get(_BITS, 16))[0] - 1  # TIFF has 12 bits too
        grey = np.clip(np.rint(np.asarray(picture) * (255 / largest)), 0, 255).astype(np.uint8)
        if tags.get(_WHITE_IS_ZERO) == 0:
            grey = 255 - grey
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode == "I":
        raise _without_range("32-bit integers")
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    rows = max(1, _BAND_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        band = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        pixels[top : top + rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return pixels


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _without_range(kind: str) -> DataError:
    return DataError(f"its pixels are {kind}, which have no defined black and white; convert it to 8 or 16 bits")


def _damaged(path: str, data: bytes, error: Exception) -> DataError:
    unknown = isinstance(error, Image.UnidentifiedImageError)
    reason = "is not an image of a known format" if unknown else f"is damaged ({type(error).__name__}: {error})"
    return DataError(f"{path}: {reason}, {len(data)} bytes; {REMEDY}")


def from_object(picture: Any) -> Picture:
    """A PIL image or a uint8 [C, H, W] tensor with 1 or 3 channels as a picture. Raises DataError."""
    if isinstance(picture, Image.Image):
        return ArrayPicture(to_rgb(picture))
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
        picture = torch.from_numpy(picture)
        if picture.ndim == 3 and picture.shape[0] not in (1, 3) and picture.shape[2] in (1, 3):
            picture = picture.permute(2, 0, 1)  # NumPy's images are usually [H, W, C]
    is_tensor = isinstance(picture, torch.Tensor)
    if is_tensor and picture.dtype == torch.uint8 and picture.ndim == 3 and picture.shape[0] in (1, 3):
        return ArrayPicture(picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    raise DataError(f"an image must be a PIL image or a uint8 tensor [1 or 3, H, W], not {describe(picture)}")


def describe(value: Any) -> str:
    """What a user's function returned, in a few words."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.40}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def check_label(label: Any, classes: int) -> int:
    """`label` as a class number. Raises DataError if it is not an integer, or outside 0..classes-1."""
    if isinstance(label, torch.Tensor | np.ndarray) and label.size and np.prod(label.shape) == 1:
        label = label.reshape(-1)[0]
    number = label.item() if isinstance(label, torch.Tensor | np.generic) and not label.shape else label
    if isinstance(number, bool) or not isinstance(number, int):
        raise DataError(f"label {describe(label)} is not an integer; a label is the number of its class, from 0")
    if not 0 <= number < classes:
        raise DataError(f"label {number} is outside 0..{classes - 1}; correct the label or set data.classes")
    return number


def check_many(labels: Any, shape: list[int], where: str) -> torch.Tensor:
    """`labels`, 0 or 1 for each class, as float32 of this shape. Raises DataError if they are something else."""
    found = torch.as_tensor(labels)
    if list(found.shape) != shape or not ((found == 0) | (found == 1)).all():
        raise DataError(
            f"{where}: with data.multi_label, labels must be 0 or 1 for each class, {shape}, not {describe(found)}"
            + (" with other values" if list(found.shape) == shape else "; set data.classes if their number is wrong")
        )
    return found.float()


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
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(picture: Picture, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """The box of a picture resized with antialiasing: uint8 [height, width, 3]."""
    # Made 4-D before the axes are swapped: torch then knows it as channels_last and takes its fast kernel.
    crop = torch.from_numpy(picture.crop(box))[None].permute(0, 3, 1, 2)
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
    # Of a very long picture only the middle is resized: its ends would be cut away, after they had filled the memory.
    # As much goes at both ends, lest the middle be another.
    rows, columns = (min(side, _LONG * short + (side - _LONG * short) % 2) for side in (height, width))
    target = (int(resize_size * rows / short), int(resize_size * columns / short))
    view = resize(picture, ((height - rows) // 2, (width - columns) // 2, rows, columns), target)
    top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return view[top : top + size, left : left + size]
