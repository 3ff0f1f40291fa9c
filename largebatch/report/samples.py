"""The first training images as the model sees them, as one image file."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

_IN_A_ROW, _PIXELS = 8, 64


def draw_samples(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> bytes:
    """PNG of normalised images, float [n, C, H, W], eight in a row; small ones are enlarged. Waits for the device."""
    factors = [torch.tensor(values).view(1, -1, 1, 1) for values in (std, mean)]
    pixels = (images.detach().float().cpu() * factors[0] + factors[1]).clamp(0, 1)
    if pixels.shape[1] not in (1, 3):
        pixels = pixels[:, :1]
    times = max(1, _PIXELS // max(pixels.shape[2:]))
    pixels = pixels.repeat_interleave(times, 2).repeat_interleave(times, 3)
    grid = (255 * make_grid(pixels, nrow=_IN_A_ROW)).round().to(torch.uint8).permute(1, 2, 0)
    png = io.BytesIO()
    Image.fromarray(grid.numpy()).save(png, "PNG")
    return png.getvalue()
