"""How accurate the exact sum is: python benchmarks/exact_accuracy.py CONFIG OUT.json [section.key=value]...

Relative L2 error of each tensor's summed gradient against the float64 sum of the same leaves, in the first steps of a
training (warmup included), for several k; beside it what sums of float32 and of bfloat16, one leaf after another, give.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.config import Config, read_config
from largebatch.data.load import load
from largebatch.distributed.environment import Launch, connect
from largebatch.distributed.exact import WIDE_STEPS, ExactSum
from largebatch.distributed.gradients import REDUCTIONS
from largebatch.plan import make_order, run_schedule
from largebatch.report.environment import describe_environment
from largebatch.report.files import write_json_atomically
from largebatch.run import build_model
from largebatch.training.optimizer import make_optimizer, set_lr
from largebatch.training.virtual_workers import VirtualWorkers

STEPS, KS = WIDE_STEPS + 12, (8, 64, 256)
IMAGES_PER_WORKER = 8


class Witnessed(ExactSum):
    """The exact sum, and beside it the same leaves added as floats."""

    def begin_step(self, loss_scale: Tensor | None = None) -> None:
        super().begin_step(loss_scale)
        self.sums: dict[str, list[Tensor]] = {}

    def take(self) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        for name, dtype in (("float64", torch.float64), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            leaf = [g.to(dtype) for g in gradients]
            self.sums[name] = [a + b for a, b in zip(self.sums[name], leaf, strict=True)] if name in self.sums else leaf
        super().take()


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative L2 error of each tensor whose gradient is not 0."""
    pairs = [(f.double(), e) for f, e in zip(found, exact, strict=True) if e.any()]
    return [float((f - e).norm() / e.norm()) for f, e in pairs]


def measure(config: Config, k: int) -> dict[str, Any]:
    """The errors over all tensors and steps at k workers."""
    batch = config.batch.model_copy(update={"virtual_workers": k, "images_per_worker": IMAGES_PER_WORKER})
    config = config.model_copy(update={"batch": batch})
    seen: dict[str, list[float]] = {"reproducible": [], "fast, float32": [], "fast, bfloat16": []}
    overflowed = 0
    with connect(Launch(), device="cpu") as ranks:
        train, _ = load(config.data, seed=config.seed, device=ranks.device)
        model = build_model(config, train, ranks).train()
        optimizer = make_optimizer(model, config.optimizer)
        order = make_order(config, train.images)
        schedule = run_schedule(config, order)
        virtual = VirtualWorkers(model, ranks, virtual_workers=k, reduction="witnessed")
        for step in range(STEPS):
            with virtual.step(step) as passes:
                for workers in passes:
                    pixels, labels = train.batch(order.epoch_of(step), order.indices(step, workers))
                    virtual.backward(F.cross_entropy(virtual(pixels), labels))
            sums = virtual.reduction.sums
            seen["reproducible"] += errors([p.grad for p in model.parameters()], sums["float64"])
            seen["fast, float32"] += errors(sums["float32"], sums["float64"])
            seen["fast, bfloat16"] += errors(sums["bfloat16"], sums["float64"])
            overflowed += int(virtual.outcome.overflowed.any())
            set_lr(optimizer, schedule.lr_at(step))
            optimizer.step()
    found = {name: {"median": statistics.median(e), "largest": max(e), "n": len(e)} for name, e in seen.items()}
    return {"k": k, "steps": STEPS, "images_per_worker": IMAGES_PER_WORKER, "overflowed_steps": overflowed, **found}


def main(config: str, out: str, *overrides: str) -> None:
    REDUCTIONS["witnessed"] = Witnessed
    results = []
    for k in KS:
        results.append(measure(read_config(config, overrides), k))
        print(results[-1], flush=True)
    report = {"environment": describe_environment(), "command": [config, *overrides], "results": results}
    write_json_atomically(Path(out), report)


if __name__ == "__main__":
    main(*sys.argv[1:])
