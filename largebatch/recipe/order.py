"""Which image goes to which virtual worker at which step: one shuffle per epoch (remark 4 of §3)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from largebatch.errors import ConfigError
from largebatch.recipe.draws import bits

_ORDER = 1  # keeps these draws apart from those of augmentation, which has keys of its own


def permutation(images: int, seed: int, *keys: int) -> np.ndarray:
    """A shuffle of ``range(images)``, int64 [images]: the images sorted by a random 64-bit key each.

    Made of hash draws, so it is the same for every version of NumPy and on every machine.
    """
    keyed = bits(np.arange(images, dtype=np.int64), seed, _ORDER, *keys)
    return np.argsort(keyed, kind="stable")


@dataclass(frozen=True)
class EpochOrder:
    """The order of a whole training: a function of the recipe, the seed and the step, never of N.

    Step t of an epoch takes images ``perm[t*kn : (t+1)*kn]``, as k rows of n; the tail is dropped.
    With `repeats` each image of perm comes that many times in a row, and the minibatch is dealt like cards, so that its
    copies go to different workers (repeated augmentation: Hoffer et al. 2020, as DeiT's and timm's samplers do it).
    Copy c of image i has the index ``i + c * images``: a source shows image i, by other draws for each copy.
    Raises ConfigError if there are fewer than kn images.
    """

    images: int
    virtual_workers: int
    images_per_worker: int
    seed: int
    shuffle: str = "once"
    """``once``: one shuffle divided among the workers; ``per_worker``: each worker shuffles all the images by
    itself, which is remark 4 done wrong (an image may come k times in an epoch, or never)."""
    repeats: int = 1
    _cache: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.images < self.global_batch:
            raise ConfigError(
                f"batch.virtual_workers: a minibatch of {self.virtual_workers} x {self.images_per_worker} = "
                f"{self.global_batch} images is more than the {self.images} training images; lower "
                "batch.virtual_workers or batch.images_per_worker"
            )

    @property
    def global_batch(self) -> int:
        return self.virtual_workers * self.images_per_worker

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.global_batch

    @property
    def dropped_images(self) -> int:
        """Images that one epoch leaves out (others every epoch)."""
        return self.images - -(-self.steps_per_epoch * self.global_batch // self.repeats)

    def recipe_step(self, step: int) -> int:
        """`step` counted by the recipe: the same, unless the run has changed its minibatch (`ResizedOrder`)."""
        return step

    def epoch_of(self, step: int) -> int:
        return self.recipe_step(step) // self.steps_per_epoch

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of `step`, and where in its shuffle the minibatch starts."""
        epoch, in_epoch = divmod(self.recipe_step(step), self.steps_per_epoch)
        return epoch, in_epoch * self.global_batch

    def indices(self, step: int, workers: range) -> np.ndarray:
        """The images of consecutive virtual `workers` at `step`, int64 [len(workers) * n], worker by worker."""
        epoch, start = self.place(step)
        n = self.images_per_worker
        if self.shuffle == "per_worker":
            first = start // self.virtual_workers
            return np.concatenate([self._shuffled(epoch, w)[first : first + n] for w in workers])
        if self.repeats > 1:
            dealt = np.arange(start, start + self.global_batch).reshape(n, self.virtual_workers).T[list(workers)]
            place, copy = np.divmod(dealt.reshape(-1), self.repeats)
            return self._shuffled(epoch, 0)[place] + copy * self.images
        return self._shuffled(epoch, 0)[start + workers.start * n : start + workers.stop * n]

    def images_consumed(self, step: int) -> int:
        """Images seen when `step` updates are done: the only state of the order that a checkpoint holds."""
        return step * self.global_batch

    def fingerprint(self, epoch: int) -> str:
        """SHA-256 of the epoch's first shuffle, which a resumed run compares with its own."""
        return hashlib.sha256(self._shuffled(epoch, 0).astype("<i8").tobytes()).hexdigest()

    def _shuffled(self, epoch: int, worker: int) -> np.ndarray:
        if (epoch, worker) not in self._cache:
            # Steps go forward: an older epoch is never asked for again (the next may be, by prefetching).
            for old in [key for key in self._cache if key[0] < epoch - 1]:
                self._cache.pop(old, None)
            self._cache[epoch, worker] = permutation(self.images, self.seed, epoch, worker)
        return self._cache[epoch, worker]


def evaluation_batches(images: int, batch: int) -> list[range]:
    """All images once, in batches of `batch` (the last may be smaller).

    The batches depend on the data alone; ranks are dealt whole batches, so each image is evaluated in the
    same company on any N and every sum is the same to the last bit.
    """
    return [range(start, min(start + batch, images)) for start in range(0, images, batch)]
