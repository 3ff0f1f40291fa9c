"""An exponential moving average (EMA) of the weights, kept next to the trained ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from largebatch.training.settings import EmaSettings


class WeightAverage:
    """The average of a model's weights and BatchNorm statistics over its updates, by the rule of timm's ModelEmaV3.

    It is a function of the updates alone, so that it is the same bits on any number of ranks. What is no floating
    point number (BatchNorm's count of batches) is not averaged.
    """

    def __init__(self, model: nn.Module, settings: EmaSettings) -> None:
        self._settings = settings
        # Detached, but the model's own memory.
        self._own = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self._averages = {name: value.clone() for name, value in self._own.items()}

    def decay_after(self, updates: int) -> float:
        """The weight of the old average when update number `updates`, from 1, is taken in: 0 for the first, and never
        more with `warmup` than 1 - t^(-2/3)."""
        if updates <= 1:
            return 0.0
        decay = self._settings.decay or 0.0
        return min(decay, 1.0 - updates ** (-2 / 3)) if self._settings.warmup else decay

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after this many updates. Does not wait for the device."""
        weight = 1.0 - self.decay_after(updates)
        torch._foreach_lerp_([*self._averages.values()], [*self._own.values()], weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model holds the average, to be evaluated and exported."""
        own = [*self._own.values()]
        with torch.no_grad():
            kept = [value.clone() for value in own]
            torch._foreach_copy_(own, [*self._averages.values()])
            try:
                yield
            finally:
                torch._foreach_copy_(own, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, under the names that the model's own `state_dict` has."""
        return self._averages

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for name, value in self._averages.items():
            value.copy_(state[name])
