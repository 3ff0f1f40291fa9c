"""How deep each parameter of a model lies, in layers from the input: for learning rates that grow with the depth."""

from __future__ import annotations

import sys

from torch import nn

from largebatch.models.compiled import blocks


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter by its name, 0 for those next to the input, the head's the largest.

    timm's models say theirs (`group_matcher`). Of others, each block in a row is a layer (of a plain chain, each layer
    with a weight); what stands before the first is layer 0, the last weight is the head, and anything else goes with
    the block before it, in the order in which the model registers its parts.
    """
    timm, matcher = sys.modules.get("timm.models"), getattr(model, "group_matcher", None)
    if timm is not None and callable(matcher):
        return timm.group_parameters(model, matcher(coarse=False), reverse=True)
    weighted = [m for m in model.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]
    head = weighted[-1] if weighted else model
    starts = {id(module) for module in [*(blocks(model) or weighted), head]}
    numbers: dict[str, int] = {}
    number = 0

    def visit(module: nn.Module, prefix: str) -> None:
        nonlocal number
        number += id(module) in starts
        numbers.update({prefix + name: number for name, _ in module.named_parameters(recurse=False)})
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.")

    visit(model, "")
    return numbers
