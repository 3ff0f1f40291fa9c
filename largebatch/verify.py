"""`largebatch verify`: whether a config's own model, data and machine keep the promise, checked on the first steps.

The same steps run on 1, 2, … N ranks, and on N with another deal of the workers in each step. After each step the
weights, BatchNorm statistics and optimizer state must have the same bits. Where they have not, the first module whose
output differs for the same workers is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from largebatch.config import Config
from largebatch.data.load import load
from largebatch.data.source import ImageSource
from largebatch.distributed.environment import Launch, Ranks
from largebatch.distributed.kernels import allow_tf32
from largebatch.distributed.roll_call import name_lost_ranks
from largebatch.distributed.subgroups import Subgroups
from largebatch.errors import ConfigError, HealthError, UserError
from largebatch.recipe.batch import Deal, deal_equally
from largebatch.report.environment import describe_environment
from largebatch.report.files import write_json_atomically
from largebatch.run import connect_ranks, unsaved_trainer
from largebatch.training.replicas import checksum, named_tensors
from largebatch.training.step import TimedBatches, train_step
from largebatch.training.trainer import Trainer

_CAUSES = (
    "Likely: forward draws from a generator of its own, keeps Python state or changes a buffer from pass to pass, or "
    "an operation has no deterministic kernel on this device"
)


@dataclass
class Record:
    """One run of the steps, as rank 0 saw it."""

    name: str
    tensors: list[dict[str, int]] = field(default_factory=list)
    """After each step, a checksum of each tensor's bits."""
    outputs: list[dict[int, dict[str, int]]] = field(default_factory=list)
    """In each step, by pass, a checksum of each module's output."""
    warned: list[str] = field(default_factory=list)
    """What torch said of operations without a deterministic kernel."""

    @property
    def digests(self) -> list[str]:
        return [hashlib.sha256(repr(sorted(step.items())).encode()).hexdigest() for step in self.tensors]


def verify(config: Config, steps: int, launch: Launch, run_dir: Path) -> None:
    """Run the comparison on the ranks of `launch`; rank 0 prints a table and writes `verify.json`.

    Raises ConfigError for a config that cannot be verified, and HealthError, on all ranks, on a difference.
    """
    execution = config.execution
    if execution.reduction != "reproducible":
        raise ConfigError(
            f"execution.reduction: {execution.reduction} is equal up to rounding only, so no bits can be compared; "
            "verify needs reproducible"
        )
    deal_equally(config.batch.dealt_workers, execution.workers_per_pass, launch.world_size)
    # Images are decoded in the process itself, since each step asks for those of another deal; fewer ranks have several
    # passes, which a static graph does not allow. Neither changes a number.
    data = config.data.model_copy(update={"loader_processes": 0})
    execution = execution.model_copy(update={"static_graph": False})
    config = config.model_copy(update={"data": data, "execution": execution})
    with connect_ranks(execution, launch, group_of_one=True) as ranks, name_lost_ranks(ranks):
        allow_tf32(execution.tf32)
        sources = load(config.data, seed=config.seed, device=ranks.device)
        groups = Subgroups(ranks, range(1, ranks.world_size + 1))
        wanted = [(n, False) for n in range(1, ranks.world_size + 1)] + [(ranks.world_size, True)]
        # On all ranks first: what is wrong with the config is said before some of them wait for others.
        unsaved_trainer(config, ranks, sources)
        records = []
        for count, shuffled in wanted:
            members = groups.first(count, ddp=count > 1)
            if members is not None:
                records.append(_run(config, steps, members, sources, shuffled))
            groups.sleep()
        difference = ranks.from_main(lambda: _report(config, records, run_dir))
    if difference:
        raise HealthError(difference)


def _run(
    config: Config, steps: int, members: Ranks, sources: tuple[ImageSource, ImageSource], shuffled: bool
) -> Record:
    trainer = unsaved_trainer(config, members, sources)
    name = f"{members.world_size} rank{'s' * (members.world_size > 1)}" + ", another deal each step" * shuffled
    record = Record(name)
    for step in range(min(steps, trainer.schedule.total_steps)):
        if shuffled:
            trainer.virtual.deal = _random_deal(trainer.virtual.deal, step)
        with _witness(trainer) as outputs, warnings.catch_warnings(record=True) as warned:
            warnings.filterwarnings("always", message=".*deterministic.*")
            _step(trainer, step)
        record.warned += [str(w.message).split(". ")[0] for w in warned if "deterministic" in str(w.message)]
        record.outputs.append(dict(itertools.chain(*(of_rank.items() for of_rank in members.gather(outputs)))))
        tensors = named_tensors(trainer.virtual.model, trainer.optimizer)
        record.tensors.append({name: int(checksum(tensor)) for name, tensor in tensors})
    return record


def _step(trainer: Trainer, step: int) -> None:
    with contextlib.closing(trainer.train.stream(trainer.passes([step]), augment=True)) as stream:
        train_step(
            trainer.virtual,
            trainer.optimizer,
            TimedBatches(stream, trainer.memory_format),
            step=step,
            lr=trainer.schedule.lr_at(step),
            autocast=trainer.autocast,
            loss_scale=trainer.loss_scale,
            loss_factor=trainer.loss_factor * trainer.schedule.loss_scale,
            loss=trainer.loss,
            mix=trainer.mix,
        )


def _random_deal(deal: Deal, step: int) -> Deal:
    """Any passes to any rank, in any order, the same on all ranks."""
    drawn, ranks = random.Random(step), len(deal.passes)
    order = drawn.sample(range(deal.leaves), deal.leaves)
    cuts = sorted(drawn.sample(range(1, deal.leaves), ranks - 1))
    passes = tuple(tuple(order[a:b]) for a, b in itertools.pairwise([0, *cuts, deal.leaves]))
    return Deal(passes, deal.workers_per_pass)


@contextlib.contextmanager
def _witness(trainer: Trainer) -> Iterator[dict[int, dict[str, int]]]:
    """Inside, by pass, a checksum of what each module gives; of compiled blocks nothing is seen."""
    seen: dict[int, dict[str, int]] = {}
    virtual = trainer.virtual

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and virtual.leaf is not None:
            of_pass = seen.setdefault(virtual.leaf, {})
            of_pass[name] = of_pass.get(name, 0) * 31 + int(checksum(output.contiguous()))

    def hook_for(name: str) -> Any:
        return lambda module, inputs, output: look(name, output)

    modules = [] if trainer.execution.compile else list(virtual.model.named_modules())
    hooks = [module.register_forward_hook(hook_for(name)) for name, module in modules if _is_small(module)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _is_small(module: nn.Module) -> bool:
    """Whether it is no container: what differs inside of one is found by its parts, or by itself if it has none."""
    return not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _report(config: Config, records: list[Record], run_dir: Path) -> str:
    """Print and write what was seen; the first difference in words, empty if there is none."""
    alone, *others = records
    differences = [_difference(alone, other) for other in others]
    width = max(len(record.name) for record in records)
    steps = len(alone.tensors)
    print(f"{alone.name:<{width}}  {steps} steps, {len(alone.tensors[0])} tensors, {alone.digests[-1][:16]}")
    for other, difference in zip(others, differences, strict=True):
        print(f"{other.name:<{width}}  {difference or 'the same bits after each step'}", flush=True)
    result = {
        "environment": describe_environment(),
        "config": config.model_dump(mode="json"),
        "runs": [{"name": r.name, "sha256": r.digests, "warned": sorted(set(r.warned))} for r in records],
        "differences": {other.name: text for other, text in zip(others, differences, strict=True) if text},
    }
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json_atomically(run_dir / "verify.json", result)
    except OSError as error:
        raise UserError(f"--run-dir: {error.filename or run_dir}: {error.strerror}; give another folder") from error
    first = next(filter(None, differences), "")
    warned = sorted({text for record in records for text in record.warned})
    kernel = f" torch says: {warned[0]}." if first and warned else ""
    return f"the bits depend on the number of ranks: {first}.{kernel} {_CAUSES}" if first else ""


def _difference(alone: Record, other: Record) -> str:
    """The first step, tensor and module that differ, in words; empty if nothing does."""
    for step, (before, now) in enumerate(zip(alone.tensors, other.tensors, strict=True)):
        odd = next((name for name in before if before[name] != now.get(name)), None)
        if odd is None:
            continue
        text = f"differs after step {step}, first in {odd}"
        for leaf, modules in sorted(alone.outputs[step].items()):
            theirs = other.outputs[step].get(leaf, {})
            module = next((name for name in modules if modules[name] != theirs.get(name)), None)
            if module is not None:
                return f"{text}; the output of module {module or 'the model itself'!r} differs for pass {leaf}"
        return f"{text}; every module's output is the same, so it is in the backward pass"
    return ""
