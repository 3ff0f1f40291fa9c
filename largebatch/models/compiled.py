"""torch.compile by regions that do not depend on DDP: a compiled model too is the same on any number of ranks."""

from __future__ import annotations

import torch
from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def compile_regions(model: nn.Module) -> None:
    """Compile the blocks of `model` one by one, in place: the names in its state_dict stay.

    Compiled as a whole under DDP, a model is cut at DDP's buckets, which one rank does not have, and rounds
    differently: what is fused is not what it was. Blocks are the same everywhere, and each hands its gradients over as
    soon as its own backward is done, so that the exchange still overlaps with backward.
    """
    torch._dynamo.config.optimize_ddp = False
    # Blocks of one class share their code; beyond the limit, those that come last would silently run uncompiled.
    torch._dynamo.config.recompile_limit = 1024
    for region in blocks(model) or [model]:
        region.compile(dynamic=False)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost composite modules that stand in a row, such as a ResNet's residual blocks; none of a plain chain of
    layers."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS) and any(child.children()):
                blocks.append(child)
            else:
                visit(child)

    visit(model)
    return blocks
