"""From the passes' gradients to their sum over all virtual workers, under DistributedDataParallel.

DDP finds the moment at which each bucket of gradients is ready; what is done with the bucket then is ours.
"""

# No `from __future__ import annotations` here: DDP checks the hook's annotations as objects.

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from largebatch.distributed.allreduce import AllReduce
from largebatch.distributed.environment import Ranks
from largebatch.distributed.exact import ExactSum
from largebatch.distributed.reductions import Bucket, FloatSum, Layout, Reduction, dense_strides
from largebatch.errors import UserError

REDUCTIONS: dict[str, Callable[..., Reduction]] = {"reproducible": ExactSum, "fast": FloatSum}
"""By the name in `execution.reduction`: from the trainable parameters, the number of leaves and the compression."""
Look = Callable[[int, Sequence[int], list[Tensor]], None]
"""Is shown a leaf's own gradients of some parameters: the leaf, the parameters' positions, the gradients."""
_REMEDY = "every parameter must take part in the loss of every pass (freeze the others with requires_grad_(False))"


class GradientExchange:
    """A step's gradients on one rank: its passes' are summed by the `reduction`, then those of all ranks.

    With several ranks, `hook` is DDP's communication hook. DDP's own averaging over ranks never happens, so the mean
    over kn images is taken once, in the loss (remark 3 of §3).
    """

    def __init__(
        self, parameters: list[nn.Parameter], reduction: Reduction, allreduce: AllReduce, on_last: Callable[[], None]
    ) -> None:
        """`on_last` is called when the last bucket of a step is on its way: from then on the rank only waits."""
        self.parameters = parameters
        self.reduction = reduction
        self.allreduce = allreduce
        """What sums the buckets; may be another one from one step to the next."""
        self._positions = {id(p): i for i, p in enumerate(parameters)}
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._on_last = on_last
        self._look: Look | None = None
        self._sent: list[Bucket] = []
        self._order: list[Bucket] = []
        self._early: list[tuple[Bucket, Future[Tensor]]] = []
        self._whole_steps = 0
        self._leaf = -1
        self._complete = False

    def begin_step(self, loss_scale: Tensor | None = None, look: Look | None = None) -> None:
        """Forget the gradients of the step before."""
        self._look, self._complete = look, False
        self._order, self._sent, self._early = self._sent or self._order, [], []
        self.drop()
        self.reduction.begin_step(loss_scale)

    def begin_pass(self, leaf: int) -> None:
        """The backward of `leaf` comes next."""
        self._leaf = leaf

    def end_pass(self) -> None:
        """The backward of a pass that is not exchanged is done."""
        if self._look is not None:
            self._look(self._leaf, range(len(self.parameters)), self.gradients())
        self.gradients()
        if self.reduction.takes_each_pass:
            self.reduction.take()

    def hook(self, _: object, bucket: GradBucket) -> Future[Tensor]:
        """What DDP calls with each bucket of the last pass, in one order on all ranks, when its gradients are ready."""
        ready = self._read(bucket)
        if self._look is not None:
            self._look(self._leaf, ready.positions, ready.gradients)
        self._sent.append(ready)
        total = self.allreduce.start(self.reduction.outgoing(ready))
        if bucket.is_last():
            self._complete = True
            self._whole_steps += 1
            self._on_last()
        return total.then(functools.partial(self._incoming, ready))

    @property
    def can_end_early(self) -> bool:
        """Whether the order of DDP's buckets is known for good: it lays them out anew after the first step."""
        return self._whole_steps > 1

    def end_early(self) -> None:
        """Exchange what the passes so far have left, without a backward: this rank runs no further one in this step.

        Other ranks are in DDP's hook meanwhile, so the buckets are those of the steps before, in their order.
        """
        for like in self._order:
            bucket = like.empty()
            held = [grad for i in bucket.positions if (grad := self.parameters[i].grad) is not None]
            if held:  # the reduction has not taken them
                torch._foreach_copy_(bucket.gradients, held)
            total = self.allreduce.start(self.reduction.outgoing(bucket))
            incoming = functools.partial(self._incoming, bucket)
            self._early.append((bucket, total.then(incoming)))
        self._complete = True

    def _incoming(self, bucket: Bucket, total: Future[Tensor]) -> Tensor:
        return self.reduction.incoming(total.value(), bucket)

    def _read(self, bucket: GradBucket) -> Bucket:
        key = tuple(map(id, bucket.parameters()))
        if key not in self._layouts:  # DDP rebuilds its buckets after the first step
            self._layouts[key] = _layout(bucket)
        return Bucket([self._positions[i] for i in key], bucket.buffer(), self._layouts[key])

    def check_complete(self) -> None:
        """Raises UserError if the last pass of a step left out a parameter: DDP has not handed over its bucket
        then, nor any later one, and a wait for them would never end."""
        if not self._complete:
            self.gradients()
            raise UserError(f"a trainable parameter got no gradient in the last pass of a step; {_REMEDY}")
        for bucket, total in self._early:
            total.wait()
            for position, gradient in zip(bucket.positions, bucket.gradients, strict=True):
                self.parameters[position].grad = gradient

    def gradients(self) -> list[Tensor]:
        """``p.grad`` of every parameter. Raises UserError if the last backward did not reach one."""
        found = [p.grad for p in self.parameters if p.grad is not None]
        if len(found) != len(self.parameters):
            if frozen := sum(not p.requires_grad for p in self.parameters):
                raise UserError(
                    f"{frozen} of the model's {len(self.parameters)} trainable parameters were frozen after "
                    "VirtualWorkers was made; freeze them first, or create it again"
                )
            raise UserError(
                f"{len(self.parameters) - len(found)} of the model's {len(self.parameters)} trainable parameters got "
                f"no gradient; {_REMEDY}"
            )
        return found

    def drop(self) -> None:
        """Leave no gradients."""
        for parameter in self.parameters:
            parameter.grad = None


def _layout(bucket: GradBucket) -> Layout:
    """Where each gradient of the bucket lies in its buffer.

    The buffer holds each in its parameter's own order of dimensions, while `GradBucket.gradients()` shapes that memory
    as if it were contiguous: for channels_last parameters those views are wrong.
    """
    start = int(bucket.buffer().storage_offset())
    return [
        (int(gradient.storage_offset()) - start, parameter.shape, dense_strides(parameter))
        for gradient, parameter in zip(bucket.gradients(), bucket.parameters(), strict=True)
    ]


def wrap(
    model: nn.Module,
    ranks: Ranks,
    exchange: GradientExchange,
    *,
    bucket_mb: float | None,
    static_graph: bool = False,
    gradient_as_bucket_view: bool = False,
) -> DistributedDataParallel:
    """`model` under DDP with our exchange of gradients, its buffers left to us (BatchNorm, contract 4)."""
    options: dict[str, Any] = {
        "process_group": ranks.group,
        "static_graph": static_graph,
        "gradient_as_bucket_view": gradient_as_bucket_view,
    }
    if bucket_mb is not None:  # else DDP's first bucket is a small one, so that communication starts early
        options["bucket_cap_mb"] = bucket_mb
    # torch 2.15 renames broadcast_buffers and warns of the old name; 2.11 knows the old one only.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    if ranks.device.type == "cuda":
        options["device_ids"] = [ranks.device.index]
    # A convolution with one input channel has strides that differ only formally; DDP warns about them.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    wrapped = DistributedDataParallel(model, **options)
    wrapped.register_comm_hook(None, exchange.hook)
    return wrapped


def synchronise(wrapped: nn.Module | None, *, last: bool) -> contextlib.AbstractContextManager[object]:
    """Keep DDP from exchanging gradients in all passes of a step but the last."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()
