"""The paper's k workers, run by N ranks: their passes, gradients, losses and BatchNorm statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.futures import Future

from largebatch.distributed.allreduce import AllReduce, BackendAllReduce
from largebatch.distributed.environment import Ranks
from largebatch.distributed.gradients import REDUCTIONS, GradientExchange, synchronise, wrap
from largebatch.distributed.heartbeat import EXCHANGE
from largebatch.distributed.kernels import deterministic
from largebatch.distributed.reductions import Outcome
from largebatch.distributed.small_sums import decode, encode
from largebatch.errors import ConfigError, UserError
from largebatch.recipe.batch import Deal, deal_equally
from largebatch.training.batchnorm import BatchNormStatistics
from largebatch.training.buffers import BufferWatch
from largebatch.training.delays import Delays
from largebatch.training.gates import Gate
from largebatch.training.generators import Generators
from largebatch.training.noise_scale import NoiseProbe
from largebatch.training.stopwatch import make_stopwatch

# Keep the seeds of dropout and the like apart from those of order and augmentation, and from each other.
_MODEL_DRAWS, _STATISTICS_DRAWS = 3, 4


class VirtualWorkers:
    """A model that k virtual workers of n images train together, whatever the number of ranks.

    Use it around an ordinary model and optimizer, on every rank alike::

        for step in range(total_steps):
            with virtual.step(step) as passes:
                for workers in passes:                        # this rank's share of the k workers
                    images, labels = ...                      # the n images of each of `workers`, in order
                    loss = cross_entropy(virtual(images), labels)
                    virtual.backward(loss)
            optimizer.step()                              # every p.grad now is that of the mean over kn images

    After the `with` block, gradients are summed over all k workers, and BatchNorm's running statistics have moved once
    towards the average over all k workers. If the block is left by an exception, gradients are dropped and BatchNorm
    is as before the step. With `reduction` "reproducible" the weights are the same to the last bit on any number of
    ranks and for any deal; with "fast" they are equal up to rounding.

    The gradients of the step before are dropped by `step`, so `optimizer.zero_grad()` is not needed.
    """

    gate: Gate | None = None
    """What may end a step early on this rank (needs `drops`)."""
    delays: Delays | None = None
    """What this rank sleeps in its forwards."""
    noise: Tensor | None = None
    """tr(Σ) and |G|², float64 [2], of the newest step (see `NoiseProbe`), if `step` was told to measure."""

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
        bucket_mb: float | None = None,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        compression: str = "none",
        seed: int = 0,
        drops: bool = False,
    ) -> None:
        """Wrap `model`, which already is on ``ranks.device``.

        `batchnorm_momentum` is the weight of the old running average (None: what each module says); with
        `batchnorm_over` "pass", the workers of a pass are normalised together, which is an ablation.
        `noise_images`, the images of a step, lets the gradient noise scale be measured; it needs the reduction
        "reproducible" and two passes. With `drops`, a step may be left without some of its passes, by the deal or by
        `gate`: all means are then over those that arrived. For the settings of the exchange see `ExecutionSettings`.
        Raises ConfigError if `virtual_workers` cannot be dealt to the ranks, or with `static_graph` if a rank would
        run several passes.
        """
        self.model = model
        self.virtual_workers = virtual_workers
        self._ranks = ranks
        self._static_graph = static_graph
        self.deal = deal_equally(virtual_workers, workers_per_pass, ranks.world_size)
        self._leaves = self.deal.leaves
        self._generators = Generators(ranks.device, seed)
        # Kernels that add in an order of their own would undo what the exact sum promises.
        self._deterministic = reduction == "reproducible"
        groups = 1 if batchnorm_over == "pass" else workers_per_pass
        self.batchnorm = BatchNormStatistics(model, workers_per_pass=groups, momentum=batchnorm_momentum)
        self.own_compute = make_stopwatch(ranks.device)
        """Runs from each pass's forward until its gradients are there, and never while other ranks are waited for."""
        self.drops = drops
        """Whether steps may be left without some of their passes."""
        self.arrived = torch.ones(self._leaves if drops else 0, dtype=torch.bool, device=ranks.device)
        """Boolean, [passes], on the device: which passes of the newest step arrived; empty without `drops`."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.reduction = REDUCTIONS[reduction](parameters, self._leaves, compression)
        self._exchange = GradientExchange(parameters, self.reduction, BackendAllReduce(ranks), on_last=self._last_sent)
        self._noise_images = noise_images
        self._probe = NoiseProbe(ranks, leaves=self._leaves, parameters=len(parameters)) if noise_images else None
        self._wrapped: nn.Module = model
        if ranks.distributed:
            options = {"static_graph": static_graph, "gradient_as_bucket_view": gradient_as_bucket_view}
            with ranks.whereabouts.waiting():
                self._wrapped = wrap(model, ranks, self._exchange, bucket_mb=bucket_mb, **options)
        self._watch: BufferWatch | None = BufferWatch(model)
        self._pass: _Pass | None = None
        self._open = False
        self._small: Tensor | None = None
        self._total: Future[Tensor] | None = None
        self._names: dict[str, torch.Size] = {}
        self.loss = torch.zeros(())
        """Mean loss over the kn images of the newest step, float64 (on the device; reading it waits for the device)."""
        self.sums: dict[str, Tensor] = {}
        """What `backward` was given as `sums`, by name, summed over all k workers of the newest step; float64."""
        self.outcome = Outcome(torch.zeros(()), torch.zeros(0))
        """Whether the newest step's gradients may be applied (see `update_unless`)."""

    @property
    def deal(self) -> Deal:
        """Which rank runs which passes; may be another one, on all ranks alike, from one step to the next."""
        return self._deal

    @deal.setter
    def deal(self, deal: Deal) -> None:
        if len(deal.passes) != self._ranks.world_size or deal.leaves * deal.workers_per_pass != self.virtual_workers:
            raise ValueError(
                f"a deal of {deal.leaves * deal.workers_per_pass} virtual workers to {len(deal.passes)} ranks, for "
                f"{self.virtual_workers} on {self._ranks.world_size}"
            )
        if deal.absent and not self.drops:
            raise ValueError("a deal with absent passes needs `drops`")
        if self._static_graph and self._ranks.distributed and deal.leaves > len(deal.passes):
            raise ConfigError(
                f"execution.static_graph: a rank has {max(map(len, deal.passes))} passes a step, and DDP allows one; "
                "start more ranks, raise execution.workers_per_pass, or turn it off"
            )
        self._deal = deal

    @property
    def leaf(self) -> int | None:
        """The number of the pass that runs now, None between steps."""
        return self._pass.leaf if self._pass is not None else None

    @property
    def workers_by_pass(self) -> list[range]:
        """The virtual workers of each of this rank's passes of a step, in order."""
        return self.deal.workers_of(self._ranks.rank)

    @contextlib.contextmanager
    def step(
        self, step: int, *, loss_scale: Tensor | None = None, measure_noise: bool = False
    ) -> Iterator[Iterator[range]]:
        """This rank's passes of `step`, each as the range of virtual workers that run in it.

        `loss_scale`, a power of two on the device, multiplies each loss before backward, and divides the sum of the
        gradients (fp16). Raises UserError if a pass is left out, or has no backward or several.
        """
        if self._open:
            raise UserError(f"virtual.step({step}): the previous step is still open; leave its `with` block first")
        assert not measure_noise or self._probe is not None, "noise_images says that this may be asked for"
        states = self._generators.save()
        self._exchange.begin_step(loss_scale, self._probe.look if self._probe and measure_noise else None)
        self.batchnorm.begin_step()
        self._small, self._total, self._open = None, None, True
        if self.gate is not None:
            self.gate.begin_step(step, self.deal)
        passes = self._passes(step, loss_scale)
        try:
            with deterministic(self._ranks.device, wanted=self._deterministic):
                yield passes
            self._check_pass(step)
            if self._pass is None or not self._pass.last:
                raise UserError(
                    f"virtual.step({step}) was left before its last pass; run all of them (`continue` and `break` lose "
                    "a worker's gradient)"
                )
            self._finish_step(measure_noise)
        except BaseException:
            self._exchange.drop()
            self.batchnorm.abandon_step()
            raise
        finally:
            passes.close()
            self.own_compute.pause()
            self._pass, self._open = None, False
            self._generators.restore(states)
            if self._ranks.device.type == "cpu":  # a GPU's host has not waited yet
                self._ranks.whereabouts.enter("between steps")

    @contextlib.contextmanager
    def exchange_by(self, allreduce: AllReduce) -> Iterator[None]:
        """Inside, whole steps exchange by `allreduce` instead: to measure, or to leave the exchange out."""
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
        average = torch.zeros_like(self.batchnorm.read(), dtype=torch.float64)
        states = self._generators.save()
        for step in range(steps):
            self.batchnorm.begin_step()
            self._small, self._total = None, None
            for leaf in self.deal.passes[self._ranks.rank]:
                self._generators.seed(_STATISTICS_DRAWS, step, leaf)
                self._ranks.whereabouts.enter("evaluation")
                self.model(next(batches)[0])
                self._add_small(self.batchnorm.batch)
            average += self._reduce_small()[0] / (self._leaves * steps)
            self.batchnorm.abandon_step()
        self._generators.restore(states)
        return average

    def __call__(self, *inputs: Any) -> Any:
        """The model's output for one pass, through DDP if there are several ranks."""
        self.own_compute.go()
        self._ranks.whereabouts.enter("forward")
        if self._pass is not None:
            self._pass.forwards += 1
            if self.delays is not None:
                self.delays.sleep(self._pass.step, self._pass.leaf)
        return self._wrapped(*inputs)

    def backward(self, loss: Tensor, *, sums: Mapping[str, Tensor] | None = None, factor: float = 1.0) -> None:
        """Backward of one pass, whose `loss` is the mean over the pass's images.

        `sums`, tensors of one element or 1-D, are summed over the k workers beside the gradients (counts, say).
        `factor` multiplies the gradients, not the loss that is reported.
        """
        now = self._pass
        if now is None:
            raise UserError("virtual.backward: there is no pass; call it inside `with virtual.step(t) as passes`")
        if not now.forwards:
            raise UserError(
                "virtual.backward: nothing was computed by virtual(...) in this pass; call virtual(images), not the "
                "model itself, whose gradients several ranks would not exchange"
            )
        now.backwards += 1
        if now.backwards > 1:
            raise UserError("virtual.backward was called twice in one pass; add the losses up and call it once")
        parts = {"loss": loss.detach(), **(sums or {})}
        self._names = {name: part.shape for name, part in parts.items()}
        vectors = [self.batchnorm.batch, *parts.values()]
        if self.drops:
            vectors.insert(0, F.one_hot(torch.tensor(now.leaf, device=self._ranks.device), self._leaves))
        self._add_small(torch.cat([vector.double().reshape(-1) for vector in vectors]))
        if self._ranks.distributed and now.last and self._small is not None:
            self._total = self._exchange.allreduce.start(self._small)
        # The mean over kn images is the sum over the passes of their means over the number of passes (remark 3).
        share = loss * (factor / self._leaves)
        if now.loss_scale is not None:
            share = share * now.loss_scale
        self._ranks.whereabouts.enter("backward")
        with torch.autocast(self._ranks.device.type, enabled=False):
            share.backward()
        self.own_compute.pause()

    def _last_sent(self) -> None:
        self._only_wait()
        if self.gate is not None:
            self.gate.pass_done()  # here, because backward returns when the others are done too

    def _only_wait(self) -> None:
        self.own_compute.pause()
        self._ranks.whereabouts.enter(EXCHANGE)

    def _passes(self, step: int, loss_scale: Tensor | None) -> Generator[range, None, None]:
        own = self.deal.passes[self._ranks.rank]
        for leaf, workers in zip(own, self.workers_by_pass, strict=True):
            self._check_pass(step)
            if self._pass is not None and not self._may_start():
                self._end_early(self._pass)
                return
            self._pass = _Pass(step, leaf, last=leaf == own[-1], loss_scale=loss_scale)
            self._exchange.begin_pass(leaf)
            self._generators.seed(_MODEL_DRAWS, step, leaf)
            self._ranks.whereabouts.enter("loader", step)
            with synchronise(self._wrapped, last=self._pass.last):
                yield workers
            if self._pass.backwards and not (self._pass.last and self._ranks.distributed):
                self._exchange.end_pass()

    def _may_start(self) -> bool:
        """Whether this rank starts another pass, after one."""
        if self.gate is None:
            return True
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # done is what the device has done, not what it has been told to
        opened = self.gate.pass_done()
        return opened or (self._ranks.distributed and not self._exchange.can_end_early)

    def _end_early(self, newest: _Pass) -> None:
        """Let `newest` have been this rank's last pass of the step. The exchange has the order of `backward`."""
        newest.last = True
        if self._ranks.distributed:
            assert self._small is not None, "a pass was done"
            self._total = self._exchange.allreduce.start(self._small)
            self._exchange.end_early()
        self._only_wait()

    def _check_pass(self, step: int) -> None:
        """Raise UserError unless the pass that ends here had its backward."""
        if self._pass is not None and not self._pass.backwards:
            raise UserError(
                f"virtual.step({step}): a pass had no backward; call virtual.backward(loss) once in each pass (not "
                "loss.backward(), which knows nothing of the other workers)"
            )

    def _add_small(self, values: Tensor) -> None:
        encoded = encode(values)
        self._small = encoded if self._small is None else self._small.add_(encoded)

    def _reduce_small(self) -> tuple[Tensor, Tensor]:
        """The passes' small sums over all workers, and whether all were finite."""
        assert self._small is not None, "every rank has a pass"
        if self._ranks.distributed:
            self._total = self._total or self._exchange.allreduce.start(self._small)
            with self._ranks.whereabouts.waiting():
                return decode(self._total.wait())
        return decode(self._small)

    def _finish_step(self, measure_noise: bool) -> None:
        if self._ranks.distributed:
            self._exchange.check_complete()
        else:
            self.reduction.finish_alone()
        if self._watch is not None:
            self._watch.check()
            self._watch = None
        total, finite = self._reduce_small()
        leaves: Tensor | int = self._leaves
        if self.drops:
            self.arrived, total = total[: self._leaves] > 0, total[self._leaves :]
            leaves = self.arrived.sum().double()
            # Each leaf carries 1/leaves. After the exact sum, so that one rounding more is all, in a replay too.
            gradients = self._exchange.gradients()
            torch._foreach_mul_(gradients, (self._leaves / leaves).to(gradients[0].dtype))
        size = self.batchnorm.size
        self.batchnorm.finish_step(total[:size] / leaves, finite)
        named = dict(zip(self._names, total[size:].split([s.numel() for s in self._names.values()]), strict=True))
        self.sums = {name: named[name].view(shape) for name, shape in self._names.items()}
        self.loss = torch.where(finite, self.sums.pop("loss").reshape(()) / leaves, torch.nan)
        self.outcome = self.reduction.end_step()
        self.noise = None
        if self._probe is not None and measure_noise:
            scale = self._pass.loss_scale if self._pass is not None else None
            self.noise = self._probe.finish(self._exchange.gradients(), self._noise_images, leaves_scaled_by=scale)


class _Pass:
    """What has happened in the newest pass of the open step."""

    def __init__(self, step: int, leaf: int, *, last: bool, loss_scale: Tensor | None) -> None:
        self.step = step
        self.leaf = leaf
        self.last = last
        self.loss_scale = loss_scale
        self.forwards = 0
        self.backwards = 0
