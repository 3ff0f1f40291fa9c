"""Generated images: for tests, for benchmarks, and to see that a set-up works before the data is there."""

from __future__ import annotations

import numpy as np
import torch

from largebatch.data.known import Split
from largebatch.data.settings import Synthetic
from largebatch.recipe.draws import bits, uniform

_CELLS = 4
_LABELS, _PATTERNS, _NOISE, _PLACES = 0x53594E01, 0x53594E02, 0x53594E03, 0x53594E04


def make_split(settings: Synthetic, *, seed: int, part: int, images: int) -> Split:
    """Images of `part` (0 training, 1 validation) that show half their class's pattern, half noise.

    uint8 [images, C, H, W] and int64 [images]; the patterns are those of both parts. The noise of an image
    is a stretch of one long noise tape, so that a few thousand images of 3 x 224 x 224 take seconds.
    """
    indices = np.arange(images)
    labels = (bits(indices, seed, part, _LABELS) >> 8) % settings.classes
    patterns = _patterns(settings, seed)
    size = patterns.shape[1]
    tape = bits(np.arange(size // 4 + 1), seed, _NOISE).view(np.uint8) >> 1
    places = (uniform(indices, seed, part, _PLACES) * (len(tape) - size)).astype(np.int64)
    pixels = np.empty((images, size), np.uint8)
    for row, (label, place) in enumerate(zip(labels.tolist(), places.tolist(), strict=True)):
        np.add(patterns[label], tape[place : place + size], out=pixels[row])
    return torch.from_numpy(pixels).view(images, *settings.shape), torch.from_numpy(labels)


def _patterns(settings: Synthetic, seed: int) -> np.ndarray:
    """uint8 [classes, C*H*W], values 0..127: for each class and channel 4 x 4 cells of random grey."""
    channels, height, width = settings.shape
    count = settings.classes * channels * _CELLS * _CELLS
    cells = (uniform(np.arange(count), seed, _PATTERNS) * 128).astype(np.uint8)
    cells = cells.reshape(settings.classes, channels, _CELLS, _CELLS)
    rows, columns = np.arange(height) * _CELLS // height, np.arange(width) * _CELLS // width
    return cells[:, :, rows[:, None], columns].reshape(settings.classes, -1)
