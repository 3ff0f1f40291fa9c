"""Tries settings of the exchange in turn and reports which were faster, and which of them change numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from largebatch.benchmark.breakdown import clearly_above_zero, interquartile_range
from largebatch.benchmark.harness import Harness
from largebatch.benchmark.options import Options
from largebatch.benchmark.tables import tune_rule
from largebatch.config import Config
from largebatch.data.source import ImageSource
from largebatch.distributed.environment import Ranks
from largebatch.errors import UserError

Settings = dict[str, dict[str, Any]]
"""Values by section and key, as in YAML."""
_BUCKETS_MB = (1.0, 5.0, 25.0, 100.0)
_ROUNDING = "sums are rounded differently, and not identically on every N"


@dataclass(frozen=True)
class Candidate:
    """Settings to try against those of the config."""

    settings: Settings
    numerics: str = ""
    """How they change the numbers of a training; empty if they do not."""

    @property
    def name(self) -> str:
        found = [f"{key}={value}" for keys in self.settings.values() for key, value in keys.items()]
        return ", ".join(found) or "as configured"

    def apply(self, config: Config) -> Config:
        return config.model_copy(
            update={
                section: getattr(config, section).model_copy(update=keys) for section, keys in self.settings.items()
            }
        )


@dataclass
class _Trial:
    candidate: Candidate
    harness: Harness
    steps: int
    windows: list[float] = field(default_factory=list)
    """Seconds of a step, each of the slowest rank."""

    @property
    def images_per_second(self) -> list[float]:
        return [self.harness.global_batch / seconds for seconds in self.windows]


def check_tune(options: Options) -> None:
    """Raise UserError where there is no exchange to tune."""
    if options.tune and options.ranks[-1] == 1:
        raise UserError("--tune: with one rank nothing is exchanged; give --ranks with an N above 1")


def candidates(config: Config, world_size: int) -> list[Candidate]:
    """What to try for `config`, whose k is that of `world_size` ranks, one change at a time."""
    execution, k = config.execution, config.batch.virtual_workers
    found = [Candidate({"execution": {"bucket_mb": mb}}) for mb in _BUCKETS_MB if mb != execution.bucket_mb]
    if not execution.gradient_as_bucket_view:
        found.append(Candidate({"execution": {"gradient_as_bucket_view": True}}))
    if not execution.static_graph and k // execution.workers_per_pass <= world_size:
        found.append(Candidate({"execution": {"static_graph": True}}))
    if execution.reduction != "fast":
        found.append(Candidate({"execution": {"reduction": "fast"}}, _ROUNDING))
    for kind in ("fp16", "bf16"):
        if execution.compression != kind:
            settings = {"execution": {"reduction": "fast", "compression": kind}}
            found.append(Candidate(settings, f"gradients are rounded to {kind}; {_ROUNDING}"))
    for factor in (2, 4):
        batch = k * factor * config.batch.images_per_worker
        numerics = f"a different training: the minibatch becomes {batch}, and the learning rate follows it"
        found.append(Candidate({"batch": {"virtual_workers": factor * k}}, numerics))
    return found


def tune(
    config: Config,
    members: Ranks,
    sources: tuple[ImageSource, ImageSource],
    options: Options,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Every candidate against the config, then the faster harmless ones together; `config` is the case's own.

    Runs on all `members` at once, which come to the same result.
    """
    possible = [
        c for c in candidates(config, members.world_size) if _fits(c.apply(config), members.world_size, sources)
    ]
    note(f"tuning at N={members.world_size}: {len(possible)} settings")
    tried = _compare(config, possible, members, sources, options)
    harmless = [t for t in tried if not t["numerics"] and t["faster"]]
    together = _combine(harmless)
    best = _compare(config, [together], members, sources, options)[0] if together.settings else None
    if best is not None and not best["faster"]:
        best = None
    return {"world_size": members.world_size, "tried": tried, "best": best}


def _fits(config: Config, world_size: int, sources: tuple[ImageSource, ImageSource]) -> bool:
    passes = config.batch.virtual_workers // config.execution.workers_per_pass
    fits_static = not config.execution.static_graph or passes <= world_size
    return fits_static and config.batch.global_batch <= sources[0].images


def _compare(
    config: Config,
    settings: Sequence[Candidate],
    members: Ranks,
    sources: tuple[ImageSource, ImageSource],
    options: Options,
) -> list[dict[str, Any]]:
    """Each of `settings` against the config, in rounds that hold a window of each."""
    trials = []
    for candidate in (Candidate({}), *settings):
        harness = Harness(candidate.apply(config), members, sources)
        trials.append(_Trial(candidate, harness, max(2, math.ceil(options.window_seconds / harness.warm_up()))))
    for number in range(options.rounds):
        for trial in trials if number % 2 == 0 else reversed(trials):
            seconds = trial.harness.window("exchange", trial.steps)[-1] / trial.steps
            trial.windows.append(max(members.gather(seconds)))
    return [_gain(trial, trials[0]) for trial in trials[1:]]


def _gain(trial: _Trial, base: _Trial) -> dict[str, Any]:
    gains = [own / other - 1 for own, other in zip(trial.images_per_second, base.images_per_second, strict=True)]
    return {
        "name": trial.candidate.name,
        "settings": trial.candidate.settings,
        "numerics": trial.candidate.numerics,
        "gain": statistics.median(gains),
        "spread": interquartile_range(gains),
        "faster": clearly_above_zero(gains),
        "images_per_second": trial.images_per_second,
        "images_per_second_as_configured": base.images_per_second,
    }


def _combine(faster: Sequence[dict[str, Any]]) -> Candidate:
    """The settings of all of them; where two say something of one key, the faster one's."""
    settings: Settings = {}
    for found in sorted(faster, key=lambda t: t["gain"]):
        for section, keys in found["settings"].items():
            settings.setdefault(section, {}).update(keys)
    return Candidate(settings)


def tune_notes(found: dict[str, Any]) -> list[str]:
    """What to paste, as YAML."""
    lines = [f"# {tune_rule(found)}"]
    best = found["best"]
    if best is None:
        lines.append("# no setting that keeps the numbers was faster beyond noise: keep the config")
    else:
        lines.append(f"# {_percent(best)} images/s at N={found['world_size']}; the numbers of a training stay the same")
        lines.append(yaml.safe_dump(best["settings"], sort_keys=False).rstrip())
    faster = [t for t in found["tried"] if t["numerics"] and t["faster"]]
    for trial in sorted(faster, key=lambda t: -t["gain"]):
        lines.append(f"# {_percent(trial)} images/s by themselves, but they change numbers: {trial['numerics']}")
        lines += [f"# {line}" for line in yaml.safe_dump(trial["settings"], sort_keys=False).splitlines()]
    return lines


def _percent(trial: dict[str, Any]) -> str:
    return f"{100 * trial['gain']:+.1f} ± {50 * trial['spread']:.1f} %"
