"""Decoding the upper part of a JPEG.

Most of a JPEG's decoding time goes into its entropy code, which can only be read from the top. A crop needs
nothing below its last row: with the picture's height lowered in the file's header the decoder stops there, and
the rows above it come out bit for bit as they would from the whole file.
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
_RESTART_INTERVAL, _SCAN, _END_OF_IMAGE = 0xDD, 0xDA, b"\xff\xd9"
_MARGIN = 8  # rows: smoothing of the colours looks at the row below


class Frame(NamedTuple):
    """A JPEG's size, and the place in the file of its height if rows at the bottom may be left out."""

    height: int
    width: int
    height_at: int | None


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
    at, frame_at, restarts, at_scan = 2, 0, False, False
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if at_scan := marker == _SCAN:
            break
        if marker in _FRAMES:
            frame_at = at
        restarts |= marker == _RESTART_INTERVAL
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    height = int.from_bytes(data[frame_at + 5 : frame_at + 7], "big")
    width = int.from_bytes(data[frame_at + 7 : frame_at + 9], "big")
    components = data[frame_at + 9]
    if frame_at == 0 or components not in (1, 3) or height == 0 or width == 0:
        return None
    # Only one scan of all components without restarts can be cut; a file without an end is shown whole to
    # the decoder, which will say so.
    cut = at_scan and data[frame_at + 1] in _SEQUENTIAL and data[at + 4] == components and not restarts
    cut = cut and data.rfind(_END_OF_IMAGE, at) > 0
    return Frame(height, width, frame_at + 5 if cut else None)


def decode_top(data: bytes, frame: Frame, rows: int) -> np.ndarray:
    """At least the uppermost `rows` of the picture: uint8 RGB [rows or more, W, 3]. Raises ValueError."""
    rows += _MARGIN
    if frame.height_at is None or rows >= frame.height:
        return simplejpeg.decode_jpeg(data)
    shortened = bytearray(data)
    shortened[frame.height_at : frame.height_at + 2] = rows.to_bytes(2, "big")
    pixels = np.empty((rows, frame.width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(shortened, buffer=pixels)
    except ValueError as error:
        # The complaint about what follows the last row comes when that row is done.
        if "extraneous bytes before marker 0xd9" not in str(error):
            raise
    return pixels
