"""What a model draws in forward comes from (seed, step, pass), never from what this process did before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from largebatch.recipe.draws import fold


class Generators:
    """The global generators of torch, Python and NumPy, which dropout and the like draw from."""

    def __init__(self, device: torch.device, seed: int) -> None:
        # The CPU's, and the device's own: torch.manual_seed seeds every kind of device, 0.7 ms even without a GPU.
        on_device = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
        self._torch = [torch.default_generator, *on_device]
        self._seed = seed

    def seed(self, kind: int, step: int, leaf: int) -> None:
        """Seed all of them for a pass; `kind` keeps draws of one purpose apart from those of another."""
        drawn = fold(self._seed, kind, step, leaf) >> 1
        for generator in self._torch:
            generator.manual_seed(drawn)
        random.seed(drawn)
        np.random.seed(drawn & 0xFFFFFFFF)

    def save(self) -> tuple[Any, ...]:
        """Their states, for `restore`: what draws between steps is not disturbed by the passes."""
        return [g.get_state() for g in self._torch], random.getstate(), np.random.get_state()

    def restore(self, states: tuple[Any, ...]) -> None:
        for generator, state in zip(self._torch, states[0], strict=True):
            generator.set_state(state)
        random.setstate(states[1])
        np.random.set_state(states[2])
