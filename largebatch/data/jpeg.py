"""Decoding the part of a JPEG that a crop needs.

Most of a JPEG's decoding time goes into its entropy code, which can only be read from the top. A crop needs
nothing below its last row: with the picture's height lowered in the file's header the decoder stops there, and
the rows above it come out bit for bit as they would from the whole file.

Restart markers (ITU T.81, E.1.4) cut the entropy code into segments of a few MCUs (blocks of 8 x 8 to 16 x 16
pixels), each of which can be decoded by itself. The segments that a crop touches, under a header with their size, are a
JPEG too, whose pixels are again those of the whole file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

try:
    import simplejpeg
except ImportError:  # Pillow decodes to the same pixels, in more time.
    simplejpeg = None

_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_RESTART_INTERVAL, _SCAN, _END_OF_IMAGE, _RESTART = 0xDD, 0xDA, 0xD9, 0xD0
_MARGIN = 8  # rows: smoothing of the colours looks at the row below
_SEGMENT_MARGIN = 2  # rows and columns: it looks at one sample of the colours on each side, which covers two pixels

Box = tuple[int, int, int, int]  # top, left, height, width


class Segments(NamedTuple):
    """How restart markers cut a picture into `rows` x `columns` segments of `height` x `width` pixels."""

    rows: int
    columns: int
    height: int
    width: int


class Frame(NamedTuple):
    """A JPEG's size, and where its parts are in the file."""

    height: int
    width: int
    size_at: int
    """Of two bytes of height and two of width."""
    scan_at: int
    """Of the entropy code, if it is a single scan that ends; 0 if it must be decoded whole."""
    interval: int
    """MCUs from one restart marker to the next; 0 without any."""
    mcu: tuple[int, int]
    """Height and width in pixels."""


def find_frame(data: bytes) -> Frame | None:
    """The frame of a grey or RGB JPEG; None for anything else, which is left to Pillow."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        return _walk(data)
    except IndexError:  # ends within its header
        return None


def _walk(data: bytes) -> Frame | None:
    """Go through the header's segments (marker, length, content) up to the first scan."""
    at, frame_at, interval, at_scan = 2, 0, 0, False
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if at_scan := marker == _SCAN:
            break
        if marker in _FRAMES:
            frame_at = at
        if marker == _RESTART_INTERVAL:
            interval = _two_bytes(data, at + 4)
        at += 2 + _two_bytes(data, at + 2)
    height, width, components = _two_bytes(data, frame_at + 5), _two_bytes(data, frame_at + 7), data[frame_at + 9]
    if frame_at == 0 or components not in (1, 3) or height == 0 or width == 0:
        return None
    # Only one scan of all components can be cut; a file without an end is shown whole to the decoder, which will say
    # so.
    cut = at_scan and data[frame_at + 1] in _SEQUENTIAL and data[at + 4] == components
    cut = cut and data.rfind(bytes([0xFF, _END_OF_IMAGE]), at) > 0
    sampling = [data[frame_at + 11 + 3 * component] for component in range(components)]
    if components == 1:  # an MCU is one block, whatever the sampling says
        sampling = [0x11]
    mcu = 8 * max(s & 15 for s in sampling), 8 * max(s >> 4 for s in sampling)
    scan_at = at + 2 + _two_bytes(data, at + 2) if cut else 0
    return Frame(height, width, frame_at + 5, scan_at, interval, mcu)


def _two_bytes(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")


def decode_box(data: bytes, frame: Frame, box: Box) -> np.ndarray:
    """A part of the picture: uint8 RGB [height, width, 3], a view. Raises ValueError."""
    top, left, height, width = box
    if frame.scan_at and frame.interval:
        part, above, before = _needed_segments(data, frame, box)
        top, left = top - above, left - before
        pixels = simplejpeg.decode_jpeg(part)
    else:
        pixels = _decode_top(data, frame, top + height + _MARGIN)
    return pixels[top : top + height, left : left + width]


def _decode_top(data: bytes, frame: Frame, rows: int) -> np.ndarray:
    if not frame.scan_at or rows >= frame.height:
        return simplejpeg.decode_jpeg(data)
    shortened = bytearray(data)
    shortened[frame.size_at : frame.size_at + 2] = rows.to_bytes(2, "big")
    pixels = np.empty((rows, frame.width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(shortened, buffer=pixels)
    except ValueError as error:
        # The complaint about what follows the last row comes when that row is done.
        if "extraneous bytes before marker 0xd9" not in str(error):
            raise
    return pixels


def segments_of(frame: Frame) -> Segments | None:
    """How the picture is cut: rows of whole segments, or segments of whole rows of MCUs; None if it is not."""
    (height, width), interval = frame.mcu, frame.interval
    across = -(-frame.width // width)
    if interval == 0 or not frame.scan_at or 0 in frame.mcu:
        return None
    if across % interval == 0:
        return Segments(-(-frame.height // height), across // interval, height, interval * width)
    if interval % across == 0:
        height *= interval // across
        return Segments(-(-frame.height // height), 1, height, across * width)
    return None


def _needed_segments(data: bytes, frame: Frame, box: Box) -> tuple[bytes | bytearray, int, int]:
    """A JPEG of the segments that a box needs, and the pixels above it and left of it that it leaves out.

    The whole file where the segments are not all there, or not in their order.
    """
    grid = segments_of(frame)
    bounds = None if grid is None else _bounds(data, frame.scan_at, grid.rows * grid.columns)
    if grid is None or bounds is None:
        return data, 0, 0
    first_row, rows = _span(box[0], box[2], grid.height, grid.rows)
    first, columns = _span(box[1], box[3], grid.width, grid.columns)
    starts = bounds[:-1].reshape(grid.rows, grid.columns)[first_row:rows, first].tolist()
    ends = bounds[1:].reshape(grid.rows, grid.columns)[first_row:rows, columns - 1].tolist()
    part = bytearray().join([data[: frame.scan_at], *(data[a:b] for a, b in zip(starts, ends, strict=True))])
    # The markers between the segments are counted from 0 to 7 again and again, so they are numbered anew.
    sizes = np.diff(bounds).reshape(grid.rows, grid.columns)[first_row:rows, first:columns]
    at = frame.scan_at + np.cumsum(sizes) - 1
    view = np.frombuffer(part, np.uint8)
    view[at] = _RESTART + np.arange(len(at)) % 8
    view[at[-1]] = _END_OF_IMAGE
    height, width = (min(rows * grid.height, frame.height), min(columns * grid.width, frame.width))
    above, before = first_row * grid.height, first * grid.width
    size = (height - above).to_bytes(2, "big") + (width - before).to_bytes(2, "big")
    part[frame.size_at : frame.size_at + 4] = size
    return part, above, before


def _span(start: int, length: int, size: int, count: int) -> tuple[int, int]:
    """The segments from and up to which pixels start ... start + length need."""
    first = max(0, (start - _SEGMENT_MARGIN) // size)
    return first, min(count, -(-(start + length + _SEGMENT_MARGIN) // size))


def _bounds(data: bytes, scan_at: int, segments: int) -> np.ndarray | None:
    """Where each segment begins in the file, and where the last one ends, markers included: int64 [segments + 1]."""
    code = np.frombuffer(data, np.uint8, offset=scan_at)
    at = np.flatnonzero(code[:-1] == 0xFF)
    marker = code[at + 1]
    end = at[marker == _END_OF_IMAGE][:1]
    is_restart = marker & 0xF8 == _RESTART
    restarts = at[is_restart]
    if len(restarts) != segments - 1 or not len(end) or (restarts > end[0]).any():
        return None
    if (marker[is_restart] & 7 != np.arange(len(restarts)) & 7).any():
        return None
    return scan_at + np.concatenate([[0], restarts + 2, end + 2])
