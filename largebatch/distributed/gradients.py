"""From the passes' gradients to their sum over all virtual workers, under DistributedDataParallel.

DDP finds the moment at which each bucket of gradients is ready; what is done with the bucket then is ours.
"""

# No `from __future__ import annotations` here: DDP checks the hook's annotations as objects.

import contextlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from largebatch.distributed.allreduce import AllReduce, BackendAllReduce, TreeAllReduce
from largebatch.distributed.environment import Ranks
from largebatch.errors import UserError
from largebatch.recipe.tree import Node, is_node, push

Look = Callable[[int, Sequence[int], list[Tensor]], None]
_REMEDY = "every parameter must take part in the loss of every pass (freeze the others with requires_grad_(False))"


class PartialGradients:
    """This rank's gradients of one step: the newest subtree in ``p.grad``, older ones beside it.

    Without a tree (reduction ``fast``) everything is accumulated in ``p.grad``, as autograd does by itself.
    """

    def __init__(self, parameters: list[nn.Parameter], leaves: int, *, tree: bool) -> None:
        self.parameters = parameters
        self._position = {id(p): i for i, p in enumerate(parameters)}
        self._leaves = leaves
        self._tree = tree
        self._stack: list[tuple[Node, list[Tensor]]] = []
        self._top: Node | None = None
        self._look: Look | None = None

    def begin_step(self, look: Look | None = None) -> None:
        """Forget the gradients of the step before.

        With a tree, `look` is shown the gradients of every pass that nothing was added to yet (of all passes with
        even numbers, and of some others): the leaf, positions of parameters, and their gradients.
        """
        self._stack, self._top, self._look = [], None, look
        for parameter in self.parameters:
            parameter.grad = None

    def begin_pass(self, leaf: int) -> None:
        """Make ``p.grad`` ready for the backward of `leaf`, the one after the last."""
        if self._top is None:
            self._top = (leaf, leaf + 1)
            return
        if self._look is not None:
            self._show(range(len(self.parameters)), self.gradients())
        sibling = self._top[1] - self._top[0] == 1 and is_node((self._top[0], leaf + 1), self._leaves)
        if sibling or not self._tree:
            # Autograd adds into p.grad in place, which is the tree's own addition of two sibling leaves.
            self._top = (self._top[0], leaf + 1)
            return
        push(self._stack, self._top, self._take(), self._leaves, _add_lists)
        self._top = (leaf, leaf + 1)

    def merge(self, parameters: list[Tensor], newest: list[Tensor]) -> list[list[Tensor]]:
        """Add to `newest`, in place, what the tree adds to it; return the other subtrees, left to right.

        `newest` holds the last subtree's gradients of `parameters` (some or all of the model's).
        """
        positions = [self._position[id(p)] for p in parameters]
        self._show(positions, newest)
        rest, top = list(self._stack), self._top
        while rest and top is not None and is_node((rest[-1][0][0], top[1]), self._leaves):
            node, gradients = rest.pop()
            torch._foreach_add_(newest, [gradients[i] for i in positions])
            top = (node[0], top[1])
        return [[gradients[i] for i in positions] for _, gradients in rest]

    def merge_locally(self) -> None:
        """With one process: leave the whole sum in ``p.grad``."""
        rest = self.merge(list(self.parameters), self.gradients())
        assert not rest, "one process holds all the leaves, which make one tree"

    def gradients(self) -> list[Tensor]:
        """``p.grad`` of every parameter. Raises UserError if the last backward did not reach one."""
        found = [p.grad for p in self.parameters if p.grad is not None]
        if len(found) != len(self.parameters):
            raise UserError(
                f"{len(self.parameters) - len(found)} of the model's {len(self.parameters)} trainable parameters got "
                f"no gradient; {_REMEDY}"
            )
        return found

    def _show(self, positions: Sequence[int], gradients: list[Tensor]) -> None:
        if self._look is not None and self._top is not None and self._top[1] - self._top[0] == 1:
            self._look(self._top[0], positions, gradients)

    def _take(self) -> list[Tensor]:
        taken = self.gradients()
        for parameter in self.parameters:
            parameter.grad = None
        return taken


def _add_lists(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(left, right)
    return left


def _bucket_views(bucket: GradBucket, flat: Tensor) -> list[Tensor]:
    """Views of `flat`, laid out as the bucket's buffer is, one per parameter of the bucket.

    The buffer holds each gradient in its parameter's own stride order, while `GradBucket.gradients()` shapes
    that memory as if it were contiguous: for channels_last parameters those views are wrong.
    """
    start = bucket.buffer().storage_offset()
    views = []
    for gradient, parameter in zip(bucket.gradients(), bucket.parameters(), strict=True):
        offset = gradient.storage_offset() - start
        if _is_dense(parameter):
            views.append(flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset() + offset))
        else:
            views.append(flat[offset : offset + parameter.numel()].view(parameter.shape))
    return views


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory in some order of its dimensions (channels_last, say)."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


class GradientExchange:
    """DDP's communication hook: sums each bucket over all virtual workers, without dividing.

    DDP's own averaging over ranks never happens, so the mean over kn images is taken once, in the loss.
    """

    def __init__(self, partial: PartialGradients, allreduce: AllReduce, compression: str = "none") -> None:
        """`compression` ``fp16`` or ``bf16`` rounds gradients to it before they are sent; `allreduce` adds in it."""
        self._partial = partial
        self._sent_as = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[compression]
        self.allreduce = allreduce
        """What sums the buckets; may be another one from one step to the next."""
        self._complete = False

    def hook(self, _: object, bucket: GradBucket) -> Future[Tensor]:
        """What DDP calls with each bucket, in one order on all ranks, when its gradients are ready."""
        newest = _bucket_views(bucket, bucket.buffer())
        parts = []
        for gradients in self._partial.merge(bucket.parameters(), newest):
            flat = torch.zeros_like(bucket.buffer())
            torch._foreach_copy_(_bucket_views(bucket, flat), gradients)
            parts.append(flat)
        parts.append(bucket.buffer())
        if self._sent_as is not None:
            parts = [part.to(self._sent_as) for part in parts]
        total = self.allreduce.start(parts)
        if bucket.is_last():
            self._complete = True
            self.allreduce.flush()
        if self._sent_as is not None:
            dtype = bucket.buffer().dtype
            return total.then(lambda done: done.value().to(dtype))
        return total

    def check_complete(self) -> None:
        """Raises UserError if the last pass of a step left out a parameter: DDP has not handed over its bucket
        then, nor any later one, and a wait for them would never end."""
        complete, self._complete = self._complete, False
        if not complete:
            self._partial.gradients()
            raise UserError(f"a trainable parameter got no gradient in the last pass of a step; {_REMEDY}")


def make_allreduce(ranks: Ranks, reduction: str, blocks: list[range], leaves: int) -> AllReduce:
    """The all-reduce for `reduction`: ``fast`` or ``reproducible``."""
    return BackendAllReduce(ranks) if reduction == "fast" else TreeAllReduce(ranks, blocks, leaves)


def wrap(
    model: nn.Module,
    ranks: Ranks,
    exchange: GradientExchange,
    *,
    bucket_mb: float,
    static_graph: bool = False,
    gradient_as_bucket_view: bool = False,
) -> DistributedDataParallel:
    """`model` under DDP with our exchange of gradients, its buffers left to us (BatchNorm, contract 4)."""
    options: dict[str, Any] = {
        "process_group": ranks.group,
        "bucket_cap_mb": bucket_mb,
        "static_graph": static_graph,
        "gradient_as_bucket_view": gradient_as_bucket_view,
    }
    # torch 2.15 renames broadcast_buffers and warns of the old name; 2.11 knows the old one only.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    if ranks.device.type == "cuda":
        options["device_ids"] = [ranks.device.index]
    # A convolution with one input channel has strides that are told apart in name only; DDP warns of those.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    wrapped = DistributedDataParallel(model, **options)
    wrapped.register_comm_hook(None, exchange.hook)
    return wrapped


def synchronise(wrapped: nn.Module | None, *, last: bool) -> contextlib.AbstractContextManager[object]:
    """Keep DDP from exchanging gradients in all passes of a step but the last."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()
