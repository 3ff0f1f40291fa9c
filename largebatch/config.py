"""The whole config of a run: the components' own sections, composed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from largebatch.configfile.loading import load_config
from largebatch.data.settings import DataSettings
from largebatch.errors import ConfigError
from largebatch.models.settings import ModelSettings
from largebatch.recipe.batch import BatchSettings
from largebatch.recipe.schedule import ScheduleSettings
from largebatch.section import FREE_ON_RESUME, FreeOnResume, Section
from largebatch.training.settings import (
    BatchNormSettings,
    CheckpointSettings,
    EmaSettings,
    EvaluationSettings,
    ExecutionSettings,
    HealthSettings,
    LoggingSettings,
    LossSettings,
    OptimizerSettings,
)


class Config(Section):
    """A training run. No key names a number of ranks: that is the launcher's business, and changes nothing."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    ema: EmaSettings = EmaSettings()
    batchnorm: BatchNormSettings = BatchNormSettings()
    execution: ExecutionSettings = ExecutionSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: FreeOnResume[CheckpointSettings] = CheckpointSettings()
    health: FreeOnResume[HealthSettings] = HealthSettings()
    logging: FreeOnResume[LoggingSettings] = LoggingSettings()
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides initialisation, order, augmentation and dropout."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        self._check_passes()
        if self.data.augmentation.mixes and self.batch.images_per_worker == 1:
            raise ValueError(
                "data.augmentation.mixup_alpha and cutmix_alpha blend images of the same virtual worker, and "
                "batch.images_per_worker 1 leaves it none to blend with; set it to 2 or more, or both of them to 0"
            )
        if "ema" in (self.checkpoint.keep_best or "") and self.ema.decay is None:
            raise ValueError(
                f"checkpoint.keep_best {self.checkpoint.keep_best} needs an average of the weights; set ema.decay"
            )
        if self.data.augmentation.repeats > 1 and self.batch.shuffle != "once":
            raise ValueError(
                f"data.augmentation.repeats {self.data.augmentation.repeats} deals copies of an image to different "
                f"virtual workers, which batch.shuffle {self.batch.shuffle} does not allow; set repeats to 1 or "
                "shuffle to once"
            )
        if self.data.multi_label and (self.loss.name == "cross_entropy" or self.loss.label_smoothing):
            raise ValueError(
                "data.multi_label has independent classes: it needs loss.name bce, without label_smoothing, or a loss "
                f"of your own (here {self.loss.name}, {self.loss.label_smoothing:g})"
            )
        if "lr_rule" not in self.schedule.model_fields_set and self.optimizer.adaptive:
            # The one default that follows another section: written out here, so that every reader sees the rule.
            object.__setattr__(self, "schedule", self.schedule.model_copy(update={"lr_rule": "sqrt"}))
        return self

    def _check_passes(self) -> None:
        k, m = self.batch.virtual_workers, self.execution.workers_per_pass
        if k % m:
            raise ValueError(
                f"execution.workers_per_pass {m} does not divide batch.virtual_workers {k}; choose one that does"
            )
        if self.batch.backup_workers % m:
            raise ValueError(
                f"execution.workers_per_pass {m} does not divide batch.backup_workers {self.batch.backup_workers}; "
                "choose one that does"
            )
        if self.logging.noise_scale_every_steps and self.batch.drops:
            raise ValueError(
                "logging.noise_scale_every_steps compares all passes of a step, and batch.deadline and backup_workers "
                "leave some out; set it to 0, or drop no workers"
            )
        if self.logging.noise_scale_every_steps and (k == m or self.execution.reduction != "reproducible"):
            raise ValueError(
                "logging.noise_scale_every_steps compares the gradients of a step's passes: it needs two of them "
                f"(here {k // m}) and execution.reduction: reproducible (here {self.execution.reduction}); set it to "
                "0, or lower execution.workers_per_pass"
            )

    def for_ranks(self, world_size: int) -> Config:
        """This config with the k that it means on this many ranks. Raises ConfigError if the rest does not fit that."""
        each = self.batch.workers_per_rank
        return self if each is None else self.with_workers(each * world_size)

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
    place in the training: `scaled_times`.
    """
    return load_config(Path(path), [*overrides, *scaled_times(Path(path), overrides)], Config)


def scaled_times(path: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides that scale warmup and decay with a `schedule.epochs` that is overridden alone, else none."""
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
        return []  # what is wrong is reported when the whole is read
    if factor == 1:
        return []
    scaled = []
    if before.warmup.kind != "none":
        scaled.append(f"schedule.warmup.epochs={round(before.warmup.epochs * factor, 6):g}")
    if before.decay.kind == "step":
        scaled.append(f"schedule.decay.epochs={[round(epoch * factor, 6) for epoch in before.decay.epochs]}")
    return scaled


def differences(old: Config, new: Config) -> list[str]:
    """Why a run of `old` cannot be resumed with `new`: one line per value that differs."""
    before, after = dict(_fixed(old)), dict(_fixed(new))
    return [
        f"{path}: was {before.get(path)!r}, now {after.get(path)!r}"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def _fixed(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values that may not differ when a run is resumed, by their paths."""
    written = section.model_dump()  # a section may leave out what another of its keys decides
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if FREE_ON_RESUME in field.metadata or name not in written:
            continue
        if isinstance(value, Section):
            yield from _fixed(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
