"""A data set that fits in memory: one uint8 tensor on the device, augmented a pass at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from largebatch.data.operations import Operations
from largebatch.data.pixels import Normalise, image_draws
from largebatch.data.source import Batches, Pass


class MemorySource:
    """Images and labels on the device.

    images: uint8 [M, C, H, W]; labels: integers [M], or 0 and 1 [M, classes]; mean, std: per channel in [0, 1]. An
    augmented image is padded with `padding` zeros on each side, cut at a random place and, with `flip`, mirrored half
    of the times, then varied by `operations`; its draws depend on (seed, epoch, index) alone, where the indices of its
    `repeats` copies are those of `EpochOrder`.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        classes: int,
        class_names: Sequence[str] = (),
        mean: Sequence[float],
        std: Sequence[float],
        padding: int = 0,
        flip: bool = False,
        operations: Operations | None = None,
        repeats: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        count, channels, height, width = images.shape
        self.images = count
        self.classes = classes
        self.class_names = tuple(class_names) or tuple(map(str, range(classes)))
        self.mean, self.std = tuple(mean), tuple(std)
        self.shape = (channels, height, width)
        self.skipped, self.leaves_out = 0, False
        self.resize_size: int | None = None
        self.labels = labels.to(device, torch.int64 if labels.ndim == 1 else torch.float32)
        self._padding, self._flip, self._seed = padding, flip, seed
        self._operations, self._repeats = operations, repeats
        self._normalise = Normalise(mean, std, self.shape, device)
        self._windows = _windows(images.to(device), padding)
        self._epoch: int | None = None
        self._offsets: tuple[Tensor, Tensor, Tensor]

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`: of each image's label and sum of bytes."""
        sums = self._windows[:, self._padding, self._padding].sum(dim=(1, 2, 3))
        labels = self.labels.long().view(self.images, -1).T
        return hashlib.sha256(torch.cat([labels, sums[None]]).cpu().numpy().tobytes()).hexdigest()

    def listing(self) -> str:
        """None: see `ImageSource.listing`."""
        return ""

    def stream(self, passes: Iterable[Pass], *, augment: bool) -> Batches:
        """See `ImageSource.stream`."""
        for epoch, indices in passes:
            yield self.batch(epoch, indices, augment=augment)

    def batch(self, epoch: int, indices: np.ndarray, augment: bool = True) -> tuple[Tensor, Tensor]:
        """(float32 [n, C, H, W], int64 [n]) on the device for int64 `indices` [n]; for a loop of your own."""
        chosen = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        if self.labels.is_cuda:
            # Pinned, so that the copy does not wait for the device.
            chosen = chosen.pin_memory().to(self.labels.device, non_blocking=True)
        if not augment:
            images = self._windows[chosen, self._padding, self._padding]
            return self._normalise(images), self.labels[chosen]
        top, left, mirror = self._draws(epoch)
        shown = chosen % self.images if self._repeats > 1 else chosen
        images = self._windows[shown, top[chosen], left[chosen]]
        if self._flip:
            # a ^ ((a ^ b) & mask) chooses between a and b as `where` does, at a third of its time for bytes.
            mask = mirror[chosen][:, None, None, None]
            images = images ^ ((images ^ images.flip(2)) & mask)
        if self._operations is not None:
            images = images.cpu()
            self._operations(images, epoch, indices)
            images = images.to(self.labels.device)
        return self._normalise(images), self.labels[shown]

    def _draws(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Top, left (int64 [M]) and mirror (uint8 [M], 255 or 0) of every copy of an image, drawn once an epoch."""
        if epoch != self._epoch:
            draws = image_draws(np.arange(self.images * self._repeats), 3, seed=self._seed, epoch=epoch)
            corner = (draws[:, :2] * (2 * self._padding + 1)).astype(np.int64)
            mirror = np.where(draws[:, 2] < 0.5, 255, 0).astype(np.uint8)
            top, left = torch.from_numpy(corner.T.copy()).to(self.labels.device)
            self._offsets = (top, left, torch.from_numpy(mirror).to(self.labels.device))
            self._epoch = epoch
        return self._offsets


def _windows(images: Tensor, padding: int) -> Tensor:
    """Every window of the padded images, a view [M, 2p+1, 2p+1, H, W, C]: indexing it copies whole rows."""
    count, channels, height, width = images.shape
    padded = images.new_zeros(count, height + 2 * padding, width + 2 * padding, channels)
    padded[:, padding : padding + height, padding : padding + width] = images.permute(0, 2, 3, 1)
    return padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
