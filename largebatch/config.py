"""The whole config of a run: the components' own sections, composed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from largebatch.configfile.loading import load_config
from largebatch.data.settings import DataSettings
from largebatch.errors import ConfigError
from largebatch.models.settings import ModelSettings
from largebatch.recipe.batch import BatchSettings
from largebatch.recipe.schedule import ScheduleSettings
from largebatch.section import Section
from largebatch.training.settings import (
    BatchNormSettings,
    CheckpointSettings,
    EvaluationSettings,
    ExecutionSettings,
    HealthSettings,
    LoggingSettings,
    OptimizerSettings,
)

# What may differ when a run goes on: it changes no number, or only says how to go on.
_FREE_ON_RESUME = (
    "batch.on_resize",
    "schedule.resize_ramp_epochs",
    "checkpoint",
    "logging",
    "data.root",
    "data.loader_processes",
    "data.prefetch",
    "data.on_error",
    "data.on_change",
    "execution.device",
    "execution.backend",
    "execution.bucket_mb",
    "execution.static_graph",
    "execution.gradient_as_bucket_view",
    "execution.timeout_minutes",
    "health",
)


class Config(Section):
    """A training run. No key names a number of ranks: that is the launcher's business, and changes nothing."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    batchnorm: BatchNormSettings = BatchNormSettings()
    execution: ExecutionSettings = ExecutionSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    health: HealthSettings = HealthSettings()
    logging: LoggingSettings = LoggingSettings()
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides initialisation, order, augmentation and dropout."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        self._check_passes()
        return self

    def _check_passes(self) -> None:
        k, m = self.batch.virtual_workers, self.execution.workers_per_pass
        if k % m:
            raise ValueError(
                f"execution.workers_per_pass {m} does not divide batch.virtual_workers {k}; choose one that does"
            )
        if self.logging.noise_scale_every_steps and (k == m or self.execution.reduction != "reproducible"):
            raise ValueError(
                "logging.noise_scale_every_steps compares the gradients of a step's passes: it needs two of them "
                f"(here {k // m}) and execution.reduction: reproducible (here {self.execution.reduction}); set it to "
                "0, or lower execution.workers_per_pass"
            )

    def with_workers(self, virtual_workers: int) -> Config:
        """This config with another k. Raises ConfigError if the rest of it does not fit that."""
        batch = self.batch.model_copy(update={"virtual_workers": virtual_workers})
        changed = self.model_copy(update={"batch": batch})
        try:
            changed._check_passes()
        except ValueError as error:
            raise ConfigError(f"with batch.virtual_workers {virtual_workers}: {error}") from error
        return changed


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config in the YAML file `path`, with ``section.key=value`` overrides. Raises ConfigError.

    Where the overrides set `schedule.epochs` and nothing else of the schedule's times, warmup and decay keep their
    place in the training: they are scaled with it.
    """
    return load_config(Path(path), [*overrides, *_scaled_times(Path(path), overrides)], Config)


def _scaled_times(path: Path, overrides: Sequence[str]) -> list[str]:
    keys = [override.partition("=")[0].strip() for override in overrides]
    times = ("schedule.warmup", "schedule.decay")
    if "schedule.epochs" not in keys or any(key == "schedule" or key.startswith(times) for key in keys):
        return []
    others = [o for o, key in zip(overrides, keys, strict=True) if key != "schedule.epochs"]
    without_times = ["schedule.warmup.kind=none", "schedule.decay.kind=none"]
    try:
        before = load_config(path, others, Config).schedule
        factor = load_config(path, [*overrides, *without_times], Config).schedule.epochs / before.epochs
    except ConfigError:
        return []  # said of the whole, in a moment
    decays = [round(epoch * factor, 6) for epoch in before.decay.epochs]
    return [f"schedule.warmup.epochs={before.warmup.epochs * factor:.6f}", f"schedule.decay.epochs={decays}"]


def differences(old: Config, new: Config) -> list[str]:
    """What keeps a run of `old` from being gone on with by `new`: one line for each value that differs."""
    before, after = dict(_flat(old.model_dump(mode="json"))), dict(_flat(new.model_dump(mode="json")))
    lines = []
    for path in sorted(before.keys() | after.keys()):
        free = any(path == key or path.startswith(key + ".") for key in _FREE_ON_RESUME)
        if not free and before.get(path) != after.get(path):
            lines.append(f"{path}: was {before.get(path)!r}, now {after.get(path)!r}")
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
