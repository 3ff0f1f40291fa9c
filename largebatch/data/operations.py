"""torchvision's random operations on single images, under draws of our own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from largebatch.data.settings import Augmentation
from largebatch.recipe.draws import fold

_OPERATIONS = 0x4F504552  # sets these draws apart from those of the crop


class Operations:
    """RandAugment or TrivialAugment, colour jitter and random erasing, in this order, as `how` asks for them.

    torchvision draws from torch's global generator, so that is seeded for each image by (seed, epoch, index), and
    given back as it was. All but erasing run in Pillow: whole numbers on one thread, the same bits in every process.
    """

    def __init__(self, how: Augmentation, *, mean: Sequence[float], seed: int) -> None:
        from torchvision.transforms import v2  # the seconds of this import are for those who use it

        self._seed = seed
        bilinear = v2.InterpolationMode.BILINEAR
        self._in_pillow: list[v2.Transform] = []
        if how.auto_augment == "randaugment":
            self._in_pillow.append(v2.RandAugment(how.ra_num_ops, how.ra_magnitude, interpolation=bilinear))
        elif how.auto_augment == "trivialaugment":
            self._in_pillow.append(v2.TrivialAugmentWide(interpolation=bilinear))
        if how.color_jitter:
            self._in_pillow.append(v2.ColorJitter(*how.color_jitter))
        # The mean becomes 0 when it is normalised, which is what torchvision's recipes erase with.
        self._erase = v2.RandomErasing(how.random_erasing, value=[round(255 * m) for m in mean])

    def __call__(self, images: Tensor, epoch: int, indices: np.ndarray) -> None:
        """Vary `images`, uint8 [n, H, W, C] on the CPU, in place; `indices` [n] are their numbers in the set."""
        with torch.random.fork_rng(devices=[]):
            for image, index in zip(images, indices.tolist(), strict=True):
                torch.default_generator.manual_seed(fold(self._seed, epoch, index, _OPERATIONS) >> 1)
                if self._in_pillow:
                    picture = Image.fromarray(image.squeeze(2).numpy())
                    for operation in self._in_pillow:
                        picture = operation(picture)
                    image.copy_(torch.from_numpy(np.array(picture)).view(image.shape))
                image.copy_(self._erase(image.permute(2, 0, 1)).permute(1, 2, 0))


def make_operations(how: Augmentation, *, mean: Sequence[float], seed: int) -> Operations | None:
    """The operations that `how` asks for, None if it asks for none."""
    wanted = how.auto_augment != "none" or how.color_jitter or how.random_erasing
    return Operations(how, mean=mean, seed=seed) if wanted else None
