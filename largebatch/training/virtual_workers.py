"""The paper's k workers, run by N ranks: their passes, gradients, losses and BatchNorm statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.futures import Future

from largebatch.distributed.allreduce import AllReduce
from largebatch.distributed.environment import Ranks
from largebatch.distributed.gradients import (
    GradientExchange,
    PartialGradients,
    make_allreduce,
    synchronise,
    wrap,
)
from largebatch.errors import ConfigError
from largebatch.recipe.batch import deal_passes
from largebatch.recipe.draws import fold
from largebatch.recipe.tree import Node, push
from largebatch.training.batchnorm import BatchNormStatistics
from largebatch.training.noise_scale import NoiseProbe
from largebatch.training.stopwatch import TimedAllReduce, make_stopwatch

# Keep the seeds of dropout and the like apart from those of order and augmentation, and from each other.
_MODEL_DRAWS, _STATISTICS_DRAWS = 3, 4


class VirtualWorkers:
    """A model that k virtual workers of n images train together, whatever the number of ranks.

    Use it around an ordinary model and optimizer, on every rank alike::

        for step in range(total_steps):
            for workers in virtual.passes(step):          # this rank's share of the k workers
                images, labels = ...                      # the n images of each of `workers`, in order
                loss = cross_entropy(virtual(images), labels)
                virtual.backward(loss)
            optimizer.step()                              # every p.grad now is that of the mean over kn images

    After the loop over `passes`, gradients are summed over all k workers, and BatchNorm's running statistics
    have moved once towards the average over all k workers. With `reduction` "reproducible" the weights are
    the same to the last bit on any number of ranks; with "fast" they are equal up to rounding.

    The gradients of the step before are dropped by `passes`, so `optimizer.zero_grad()` is not needed.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        *,
        virtual_workers: int,
        workers_per_pass: int = 1,
        reduction: str = "reproducible",
        batchnorm_momentum: float | None = None,
        batchnorm_over: str = "worker",
        noise_images: int = 0,
        bucket_mb: float = 25.0,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        compression: str = "none",
        seed: int = 0,
    ) -> None:
        """Wrap `model`, which already is on ``ranks.device``.

        `batchnorm_momentum` is the weight of the old running average (None: what each module says); with
        `batchnorm_over` "pass", the workers of a pass are normalised together, which is an ablation.
        `noise_images`, the images of a step, lets the gradient noise scale be measured; it needs the reduction
        "reproducible" and two passes. For the settings of the exchange see `ExecutionSettings`.
        Raises ConfigError if `virtual_workers` cannot be dealt to the ranks, or with `static_graph` if a rank would
        run several passes.
        """
        blocks = deal_passes(virtual_workers, workers_per_pass, ranks.world_size)
        if static_graph and ranks.distributed:
            _check_one_pass_each(blocks)
        self.model = model
        self.virtual_workers = virtual_workers
        self._leaves = virtual_workers // workers_per_pass
        self._block = blocks[ranks.rank]
        self._tree = reduction == "reproducible"
        self._seed = seed
        self._generators = _default_generators(ranks.device)
        if self._tree and ranks.device.type == "cuda":
            # Kernels that add in an order of their own would undo what the tree promises.
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.batchnorm = BatchNormStatistics(
            model,
            workers_per_pass=1 if batchnorm_over == "pass" else workers_per_pass,
            momentum=batchnorm_momentum,
        )
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients = PartialGradients(parameters, self._leaves, tree=self._tree)
        self._noise_images = noise_images
        self._probe = NoiseProbe(ranks, leaves=self._leaves, parameters=len(parameters)) if noise_images else None
        self._measures_noise = False
        self.own_compute = make_stopwatch(ranks.device)
        """Runs from each pass's forward until its gradients are there, and never while other ranks are waited for."""
        self._distributed = ranks.distributed
        self._wrapped: nn.Module = model
        if self._distributed:
            allreduce = make_allreduce(ranks, reduction, blocks, self._leaves)
            timed = TimedAllReduce(allreduce, self.own_compute)
            self._exchange = GradientExchange(self._gradients, timed, compression)
            options = {"static_graph": static_graph, "gradient_as_bucket_view": gradient_as_bucket_view}
            self._wrapped = wrap(model, ranks, self._exchange, bucket_mb=bucket_mb, **options)
        self._sums: list[tuple[Node, Tensor]] = []
        self._total: Future[Tensor] | None = None
        self._leaf = -1
        self.workers_by_pass = [range(p * workers_per_pass, (p + 1) * workers_per_pass) for p in self._block]
        """The virtual workers of each of this rank's passes of a step, in order."""
        self.loss = torch.zeros(())
        """Mean loss over the kn images of the newest step (on the device; reading it waits for the device)."""
        self.sums = torch.zeros(0)
        """What `backward` was given as `also_sum`, summed over all k workers of the newest step."""
        self.noise: Tensor | None = None
        """tr(Σ) and |G|², float64 [2], of the newest step (see `NoiseProbe`), if `passes` was told to measure."""

    def passes(self, step: int, *, measure_noise: bool = False) -> Iterator[range]:
        """This rank's passes of `step`, each as the range of virtual workers that run in it."""
        assert not measure_noise or self._probe is not None, "noise_images says that this may be asked for"
        self._measures_noise = measure_noise
        self._gradients.begin_step(self._probe.look if self._probe and measure_noise else None)
        self.batchnorm.begin_step()
        self._sums, self._total = [], None
        for leaf, workers in zip(self._block, self.workers_by_pass, strict=True):
            self._leaf = leaf
            self._gradients.begin_pass(leaf)
            self._seed_draws(_MODEL_DRAWS, step, leaf)
            with synchronise(self._wrapped, last=self._is_last_pass):
                yield workers
        self._finish_step()

    @contextlib.contextmanager
    def exchange_by(self, allreduce: AllReduce) -> Iterator[None]:
        """Inside, whole steps exchange by `allreduce` instead: to measure, or to leave the exchange out.

        Does nothing where there is no DDP, hence nothing to exchange.
        """
        if not self._distributed:
            yield
            return
        own, self._exchange.allreduce = self._exchange.allreduce, allreduce
        try:
            yield
        finally:
            self._exchange.allreduce = own

    @torch.no_grad()
    def measure_statistics(self, batches: Iterator[tuple[Tensor, Tensor]], steps: int) -> Tensor:
        """BatchNorm's statistics with the current weights, averaged over all k workers and `steps` steps.

        Takes this rank's passes of images from `batches`; the running statistics stay as they are. The layout is
        that of `BatchNormStatistics.read`.
        """
        average = torch.zeros_like(self.batchnorm.read())
        for step in range(steps):
            self.batchnorm.begin_step()
            self._sums = []
            for leaf in self._block:
                self._leaf = leaf
                self._seed_draws(_STATISTICS_DRAWS, step, leaf)
                self.model(next(batches)[0])
                self._add_sums(self.batchnorm.read())
            average += self._reduce_sums() / (self._leaves * steps)
            self.batchnorm.abandon_step()
        return average

    def __call__(self, *inputs: Any) -> Any:
        """The model's output for one pass, through DDP if there are several ranks."""
        self.own_compute.go()
        return self._wrapped(*inputs)

    def backward(
        self, loss: Tensor, *, also_sum: Tensor | None = None, scale: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Backward of one pass, whose `loss` is the mean over the pass's images.

        `also_sum`, 1-D, is summed over the k workers beside the gradients (counts, say). `scale` (a
        GradScaler's, say) is applied to what is differentiated, not to the loss that is reported.
        """
        own = loss.detach().to(torch.promote_types(torch.float32, loss.dtype)).reshape(1)
        parts = [*self.batchnorm.buffers, own] if also_sum is None else [*self.batchnorm.buffers, own, also_sum]
        self._add_sums(torch.cat(parts))  # of the widest of their types
        if self._distributed and self._is_last_pass:
            self._total = self._exchange.allreduce.start([value for _, value in self._sums])
        # The mean over kn images is the sum over the passes of their means over the number of passes (remark 3).
        share = loss / self._leaves
        (scale(share) if scale else share).backward()
        self.own_compute.pause()

    def _seed_draws(self, kind: int, step: int, leaf: int) -> None:
        """Dropout and the like draw from (seed, step, pass), never from what this process did before."""
        for generator in self._generators:
            generator.manual_seed(fold(self._seed, kind, step, leaf) >> 1)

    @property
    def _is_last_pass(self) -> bool:
        return self._leaf == self._block[-1]

    def _add_sums(self, value: Tensor) -> None:
        if self._tree or not self._sums:
            push(self._sums, (self._leaf, self._leaf + 1), value, self._leaves, torch.add)
        else:
            self._sums[0][1].add_(value)

    def _reduce_sums(self) -> Tensor:
        """The passes' sums over all workers, at once."""
        values = [value for _, value in self._sums]
        if not self._distributed:
            return values[0]
        total = self._exchange.allreduce.start(values)
        self._exchange.allreduce.flush()
        return total.wait()

    def _finish_step(self) -> None:
        if self._total is not None:
            self._exchange.check_complete()
            total = self._total.wait()
        else:
            self._gradients.merge_locally()
            total = self._reduce_sums()
        self.noise = None
        if self._probe is not None and self._measures_noise:
            self.noise = self._probe.finish(self._gradients.gradients(), self._noise_images)
        size = self.batchnorm.size
        self.batchnorm.finish_step(total[:size] / self._leaves)
        self.loss = total[size] / self._leaves
        self.sums = total[size + 1 :].clone()  # not the memory of the exchange, which the next step uses again


def _default_generators(device: torch.device) -> list[torch.Generator]:
    """The CPU's, and the device's own: torch.manual_seed seeds every kind of device, 0.7 ms even without a GPU."""
    on_device = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *on_device]


def _check_one_pass_each(blocks: list[range]) -> None:
    if max(map(len, blocks)) > 1:
        raise ConfigError(
            f"execution.static_graph: a rank has {max(map(len, blocks))} passes a step, and DDP allows one; "
            "start more ranks, raise execution.workers_per_pass, or turn it off"
        )
