"""How far the weights of two finished runs are from each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_WEIGHTS = "model.pt"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def weight_distance(run_dir: Path, other: Path) -> dict[str, Any] | None:
    """``identical`` (to the last bit, all of model.pt), and the largest absolute difference of any ``weight`` and of
    any of BatchNorm's running ``statistics``.

    None where one of the runs has not finished, or they are not of one shape.
    """
    if not ((run_dir / _WEIGHTS).exists() and (other / _WEIGHTS).exists()):
        return None
    import torch

    ours, theirs = (torch.load(folder / _WEIGHTS, weights_only=True) for folder in (run_dir, other))
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return None
    largest = {"weight": 0.0, "statistics": 0.0}
    for key in ours:
        kind = "statistics" if key.rpartition(".")[2] in _STATISTICS else "weight"
        largest[kind] = max(largest[kind], (ours[key].double() - theirs[key].double()).abs().max().item())
    return {"identical": all(torch.equal(ours[key], theirs[key]) for key in ours), **largest}
