"""Sums since the last metrics record, by name: adding a metric touches its step and its record, but no format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Interval:
    """Kept on the device until they are read."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def add(self, sums: dict[str, Tensor], *, counts: Tensor | None = None) -> None:
        """Add one step's `sums`, unless `counts` (boolean, []) says that the step was left out."""
        for name, value in sums.items():
            value = value.double()
            if counts is not None:
                value = torch.where(counts, value, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self, name: str) -> list[float]:
        """The sum of a vector, or of a scalar as one element; nothing if it was never added. Waits for the device."""
        return self.sums[name].reshape(-1).tolist() if name in self.sums else []

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "steps": self.steps}
