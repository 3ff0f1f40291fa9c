"""Synchronous replicas must be identical: weights, BatchNorm statistics and optimizer state, on every rank."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from largebatch.distributed.environment import Ranks
from largebatch.errors import HealthError

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(
    model: nn.Module, optimizer: Optimizer, ranks: Ranks, *, step: int, average: dict[str, Tensor] | None = None
) -> None:
    """Raise HealthError, naming the differing rank and its first differing tensor, unless all ranks hold the same bits.

    Called on all ranks at the same step; waits for the device. With two ranks there is no majority.
    `average` is that of the weights.
    """
    if ranks.world_size == 1:
        return
    tensors = dict(named_tensors(model, optimizer))
    tensors |= {f"the average of {name}": value for name, value in (average or {}).items()}
    sums = ranks.gather(torch.stack([checksum(t) for t in tensors.values()]).tolist())
    (majority, votes), *_ = Counter(map(tuple, sums)).most_common()
    odd = [rank for rank, own in enumerate(sums) if tuple(own) != majority]
    if not odd:
        return
    names = list(tensors)
    where = next(names[i] for i in range(len(names)) if sums[odd[0]][i] != majority[i])
    who = f"rank {odd[0]} differs" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))} differ"
    if votes <= len(odd):
        who = f"ranks {', '.join(map(str, range(ranks.world_size)))} disagree, and no majority says which is right"
    raise HealthError(
        f"replicas are not identical after step {step}: {who} (first in {where}); the memory of that machine or "
        "device cannot be trusted. Run the same command again without it: the run resumes from the newest "
        "checkpoint, which was written while all replicas agreed"
    )


def digest_of(weights: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of a `state_dict`'s names and tensors, which is the same for a model and its `model.pt`."""
    hashed = hashlib.sha256()
    for name, value in weights.items():
        hashed.update(name.encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def named_tensors(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """All that a training carries from step to step, with names for messages."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    yield from model.state_dict().items()
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"the optimizer's {key} of {names.get(id(parameter), '?')}", value


def checksum(tensor: Tensor) -> Tensor:
    """The sum of the tensor's bits read as integers, modulo 2**64: any single flipped bit changes it."""
    bits = tensor.detach().reshape(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])
    return bits.sum(dtype=torch.int64)
