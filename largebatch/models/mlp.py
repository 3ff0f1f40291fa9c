"""The multilayer perceptron of the introductory note: 784-100-100-100-100-10 with ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Images of shape (batch, channels, height, width), flattened, to logits of shape (batch, classes)."""

    def __init__(self, shape: tuple[int, int, int], hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        widths = [math.prod(shape), *hidden]
        self.hidden = nn.ModuleList(nn.Linear(below, above) for below, above in pairwise(widths))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        out = images.flatten(1)
        for layer in self.hidden:
            out = layer(out).relu()
        return self.fc(out)
