"""mixup and CutMix: images of a virtual worker blended with each other, and their labels with them."""

from __future__ import annotations

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from largebatch.data.settings import Augmentation
from largebatch.recipe.draws import uniform

_MIXING = 0x4D495855  # sets these draws apart from those of order and augmentation


class Mixing:
    """Blends each image with its neighbour in the same virtual worker, by draws from (seed, step, worker) alone.

    One share and one operation for each worker and step, as `torchvision.transforms.v2` and timm's `mode="batch"` do
    for a batch: mixup (Zhang et al. 2018) adds ``share * image + (1 - share) * neighbour``; CutMix (Yun et al. 2019)
    pastes a box of the neighbour, and its share is what is left of the image's own area.
    """

    def __init__(self, how: Augmentation, *, classes: int, seed: int) -> None:
        self._how, self._classes, self._seed = how, classes, seed

    def __call__(self, images: Tensor, labels: Tensor, step: int, workers: range) -> tuple[Tensor, Tensor]:
        """A pass of consecutive virtual `workers`, worker by worker: float [n, C, H, W] and labels, int64 [n] or
        float32 [n, classes].

        Returns mixed images and the probability of each class, float32 [n, classes]; leaves the inputs as they are.
        """
        images, targets = images.clone(), labels.clone()
        if labels.ndim == 1:
            targets = F.one_hot(labels, self._classes).float()
        each = len(images) // len(workers)
        for worker, own, target in zip(workers, images.split(each), targets.split(each), strict=True):
            share, box = self.draw(step, worker, *images.shape[2:])
            if box is not None:
                top, bottom, left, right = box
                own[..., top:bottom, left:right] = own[..., top:bottom, left:right].roll(1, 0)
            elif share < 1:
                own.copy_(_blend(own, share))
            target.copy_(_blend(target, share))
        return images, targets

    def draw(self, step: int, worker: int, height: int, width: int) -> tuple[float, tuple[int, int, int, int] | None]:
        """The share of an image's own label; for CutMix, also (top, bottom, left, right) of its neighbour's box."""
        from scipy.special import betaincinv  # a quarter of a second, which only a run that mixes has to spend

        how = self._how
        applied, switch, quantile, x, y = uniform(np.arange(5), self._seed, step, worker, _MIXING).tolist()
        if applied >= how.mixup_prob:
            return 1.0, None
        cuts = how.cutmix_alpha > 0 and (how.mixup_alpha == 0 or switch < how.mixup_switch_prob)
        alpha = how.cutmix_alpha if cuts else how.mixup_alpha
        share = float(betaincinv(alpha, alpha, quantile))  # Beta(alpha, alpha) of a uniform draw
        if not cuts:
            return share, None
        top, bottom = _side(height, y, share)
        left, right = _side(width, x, share)
        return 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)


def _blend(values: Tensor, share: float) -> Tensor:
    return values.roll(1, 0).mul_(1 - share).add_(values * share)


def _side(length: int, draw: float, share: float) -> tuple[int, int]:
    """Where a box with a centre drawn from all of `length` starts and ends, cut off at the edge."""
    half, centre = int(length * 0.5 * math.sqrt(1 - share)), int(draw * length)
    return max(0, centre - half), min(length, centre + half)
