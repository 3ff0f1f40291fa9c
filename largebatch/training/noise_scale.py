"""The gradient noise scale: how large a minibatch this model and data still make good use of.

B_simple = tr(Σ) / |G|² of McCandlish et al. 2018 (appendix A.1), G the true gradient and Σ the covariance of the
gradient of one image. Gradients over b and over B images give unbiased estimates of both, because their squared
norms have the expectations |G|² + tr(Σ)/b and |G|² + tr(Σ)/B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from largebatch.distributed.environment import Ranks


def estimate(small: Tensor, large: Tensor, small_batch: int, large_batch: int) -> tuple[Tensor, Tensor]:
    """Unbiased estimates of tr(Σ) and |G|² from the mean squared norms of gradients over two numbers of images."""
    noise = (small - large) / (1 / small_batch - 1 / large_batch)
    squared_norm = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    return noise, squared_norm


class NoiseProbe:
    """Measures both within a training step, where the k workers' gradients come by anyway: each pass's by itself, so
    that nothing depends on the number of ranks, to the last bit."""

    def __init__(self, ranks: Ranks, *, leaves: int, parameters: int) -> None:
        """A step has `leaves` passes (at least 2), the model that many trainable `parameters` (tensors)."""
        assert leaves > 1, "the config is checked"
        self._ranks = ranks
        self._leaves = leaves
        self._parameters = parameters
        self._squares = self._zeros()

    def _zeros(self) -> Tensor:
        return torch.zeros(self._leaves, self._parameters, dtype=torch.float64, device=self._ranks.device)

    def look(self, leaf: int, positions: Sequence[int], gradients: list[Tensor]) -> None:
        """Take in a leaf's own gradients of some parameters, given by their positions in the model."""
        squares = torch.stack(torch._foreach_norm(gradients)).double().square()
        self._squares[leaf, torch.tensor(positions, device=squares.device)] = squares

    def finish(self, summed: list[Tensor], images: int, *, leaves_scaled_by: Tensor | None) -> Tensor:
        """tr(Σ) and |G|² of a step over `images` images, float64 [2], from the summed gradients of all parameters.

        `leaves_scaled_by` is the loss scale that the leaves still carry. All ranks call it together.
        """
        # Every leaf was looked at by one rank, the others hold zeros: this sum is exact.
        leaves = self._ranks.sum(self._squares.sum(dim=1))
        self._squares = self._zeros()
        if leaves_scaled_by is not None:
            leaves = leaves / leaves_scaled_by.square()
        # A leaf's gradient is a share of the sum: of the loss over its images, divided by the number of leaves.
        small = leaves.mean() * self._leaves**2
        large = torch.stack(torch._foreach_norm(summed)).double().square().sum()
        return torch.stack(estimate(small, large, images // self._leaves, images))
