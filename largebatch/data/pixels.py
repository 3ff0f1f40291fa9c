"""Random numbers of an image, and its way from bytes to the model's numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from largebatch.recipe.draws import uniform

_AUGMENTATION = 0x4155474D  # sets these draws apart from those of the shuffle
_DRAWS = 64  # more than any augmentation uses for one image


def image_draws(indices: np.ndarray, count: int, *, seed: int, epoch: int) -> np.ndarray:
    """`count` float64 in [0, 1) for each of the images: [n, count], a function of (seed, epoch, index)."""
    assert count <= _DRAWS
    return uniform(indices[:, None] * _DRAWS + np.arange(count), seed, epoch, _AUGMENTATION)


class Normalise:
    """uint8 [n, H, W, C] -> float32 [n, C, H, W] (channels_last in memory), (x / 255 - mean) / std."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self.shape = shape
        pixels = shape[1] * shape[2]
        # A factor for every element, not for every channel: an innermost dimension of 3 is ten times slower.
        scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32)
        offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
        self._scale = scale.repeat(pixels).to(device)
        self._offset = offset.repeat(pixels).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        channels, height, width = self.shape
        # Two rounded operations: a fused one may round differently in the vector loop and in its tail, and
        # the same image would differ with its place in the pass.
        flat = images.flatten(1).to(torch.float32).mul_(self._scale).add_(self._offset)
        return flat.view(len(images), height, width, channels).permute(0, 3, 1, 2)
