"""Restart markers for JPEGs that have none: the same pixels, in a file of which a part can be decoded by itself."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np

from largebatch.data.jpeg import find_frame, segments_of, simplejpeg
from largebatch.errors import DataError

_PROGRAM = "jpegtran"
_SEGMENT_WIDTH = 48  # pixels at least: a marker costs about four bytes, which half as many pixels would notice


def check_jpegtran() -> None:
    """Raise DataError if what `with_restart_markers` needs is not on this machine."""
    if shutil.which(_PROGRAM) is None:
        raise DataError(
            f"--restart-markers: {_PROGRAM} is not on this machine; install libjpeg-turbo-progs (Debian, Ubuntu) or "
            "libjpeg-turbo-utils (Fedora)"
        )
    if simplejpeg is None:
        raise DataError("--restart-markers: needs simplejpeg, with which such files are read; pip install simplejpeg")


def with_restart_markers(data: bytes) -> bytes:
    """The JPEG coded anew, without loss, with restart markers that cut each row of MCUs into equal segments.

    Metadata stay. As it was, where it is no JPEG that can be cut, is damaged, or would not decode to the same pixels.
    """
    frame = find_frame(data)
    if frame is None or 0 in frame.mcu:
        return data
    width = frame.mcu[1]
    across = -(-frame.width // width)
    shortest = min(across, -(-_SEGMENT_WIDTH // width))
    interval = next(mcus for mcus in range(shortest, across + 1) if across % mcus == 0)
    command = [_PROGRAM, "-copy", "all", "-optimize", "-restart", f"{interval}B"]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    made = find_frame(done.stdout)
    if done.returncode or made is None or segments_of(made) is None:
        return data
    try:
        same = np.array_equal(simplejpeg.decode_jpeg(data), simplejpeg.decode_jpeg(done.stdout))
    except ValueError:
        return data
    return done.stdout if same else data
