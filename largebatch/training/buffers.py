"""Buffers that a model's forward changes: all but BatchNorm's would come to differ from rank to rank."""

from __future__ import annotations

from torch import nn

from largebatch.errors import UserError
from largebatch.models.normalisation import batchnorm_modules


class BufferWatch:
    """Looks at a model's buffers before and after the passes of a step."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own = {
            f"{name}.{buffer}" if name else buffer
            for name, module in batchnorm_modules(model)
            for buffer, _ in module.named_buffers(recurse=False)
        }
        self._before = self._seen()

    def check(self) -> None:
        """Raise UserError if a buffer was written to, or replaced, since this watch was made."""
        now = self._seen()
        changed = sorted(name for name in self._before | now if self._before.get(name) != now.get(name))
        if changed:
            raise UserError(
                f"model.name: the model's forward changes the buffer {changed[0]!r}"
                + (f" and {len(changed) - 1} more" if len(changed) > 1 else "")
                + ". Each rank would change its own, by its own images, and the result would depend on the number of "
                "ranks; BatchNorm's statistics are the only ones that are averaged over the workers. Use a layer "
                "without such a buffer (spectral_norm, InstanceNorm with track_running_stats and the like have one)"
            )

    def _seen(self) -> dict[str, tuple[int, int]]:
        buffers = self._model.named_buffers()
        return {name: (id(buffer), buffer._version) for name, buffer in buffers if name not in self._own}
