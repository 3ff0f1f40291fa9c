"""The learning rate as a pure function of the step (§2.1, §2.2 and §5.1 of the paper)."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from largebatch.section import FreeOnResume, Section


class WarmupSettings(Section):
    """How the learning rate gets from the reference to its peak (§2.2)."""

    kind: Literal["none", "constant", "gradual"] = "gradual"
    """gradual: by a constant amount at each step; constant: the reference rate, then the peak; none."""
    epochs: float = Field(5.0, ge=0)
    """Length of the warmup, in epochs; rounded to whole steps. If not given: 5 of 90 epochs, in proportion."""
    start_lr: float | None = Field(None, ge=0)
    """Learning rate of step 0, also of a minibatch no larger than the reference. null: the reference rate, and no
    warmup up to the reference minibatch (§5.1)."""


class DecaySettings(Section):
    """How the learning rate falls after the warmup (§5.1)."""

    kind: Literal["step", "cosine", "none"] = "step"
    """step: times `factor` at each of `epochs`; cosine: half a cosine from the warmup's end to `final_lr`; none."""
    epochs: list[float] = Field(default=[30.0, 60.0, 80.0])
    """Epochs at which the rate is multiplied by `factor` (kind step). If not given: 30, 60 and 80 of 90 epochs, in
    proportion."""
    factor: float = Field(0.1, gt=0, le=1)
    """What the rate is multiplied by at each decay (kind step)."""
    final_lr: float = Field(0.0, ge=0)
    """Learning rate at the end (kind cosine)."""

    @model_validator(mode="after")
    def _ascending(self) -> DecaySettings:
        if any(e <= 0 for e in self.epochs) or self.epochs != sorted(set(self.epochs)):
            raise ValueError(f"epochs {self.epochs} must be positive and strictly ascending")
        return self


_FIX = "set schedule.epochs alone on the command line, which scales warmup and decays with it, or give"


class ScheduleSettings(Section):
    """The small-batch recipe and the rule that scales it to kn images."""

    reference_lr: float = Field(0.1, gt=0, le=1e6)
    """η: the learning rate of the small-batch recipe."""
    reference_batch: int = Field(256, ge=1)
    """The minibatch for which `reference_lr` is right (the paper: 256)."""
    lr_rule: Literal["linear", "sqrt", "none"] = "linear"
    """How η grows with kn / reference_batch: the paper's rule is linear. Left out, it is sqrt for the optimizers adamw
    and lamb, whose update does not grow with the gradient, and linear for the others."""
    scale: Literal["lr", "loss"] = "lr"
    """What the rule's factor multiplies. `loss` is the paper's remark 1 done wrong: with weight decay it is
    not the same."""
    warmup: WarmupSettings = WarmupSettings()
    decay: DecaySettings = DecaySettings()
    epochs: float = Field(90.0, gt=0, le=1e6)
    """Length of the training, in epochs; rounded to whole steps."""
    resize_ramp_epochs: FreeOnResume[float] = Field(0.25, ge=0)
    """With `batch.on_resize: rescale`, how long the learning rate takes, in epochs, from the old minibatch's to that
    of a larger one; a lower one is taken at once."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_in_proportion(cls, given: Any) -> Any:
        """Warmup and decays that are not given keep their place in the paper's 90 epochs."""
        epochs = given.get("epochs", 90) if isinstance(given, dict) else 90
        if epochs == 90 or not isinstance(epochs, int | float) or not 0 < epochs < math.inf:
            return given
        warmup, decay = given.get("warmup", {}), given.get("decay", {})
        if isinstance(warmup, dict) and warmup.get("kind") != "none":
            warmup = {"epochs": 5 * epochs / 90, **warmup}
        if isinstance(decay, dict) and decay.get("kind", "step") == "step":
            decay = {"epochs": [at * epochs / 90 for at in (30, 60, 80)], **decay}
        return {**given, "warmup": warmup, "decay": decay}

    @model_validator(mode="after")
    def _fits(self) -> ScheduleSettings:
        if self.warmup.kind != "none" and self.warmup.epochs > self.epochs:
            raise ValueError(
                f"warmup.epochs {self.warmup.epochs:g} is longer than the training's {self.epochs:g} epochs; "
                f"{_FIX} warmup.epochs below that too, or warmup: {{kind: none}}"
            )
        if self.decay.kind == "step" and self.decay.epochs and self.decay.epochs[-1] >= self.epochs:
            raise ValueError(
                f"decay.epochs ends at {self.decay.epochs[-1]:g}, but training has only {self.epochs:g} epochs, so "
                f"that decay would never happen; {_FIX} decay.epochs below that too, or decay: {{kind: none}}"
            )
        if self.warmup.start_lr is not None and self.warmup.start_lr > self.reference_lr:
            raise ValueError(
                f"warmup.start_lr {self.warmup.start_lr:g} is larger than reference_lr {self.reference_lr:g}; a warmup "
                "starts from a smaller one"
            )
        return self


@dataclass(frozen=True)
class Schedule:
    """A schedule in steps: everything `lr_at` needs, nothing to checkpoint."""

    start_lr: float
    """Learning rate at step 0 of a warmup."""
    peak_lr: float
    total_steps: int
    warmup_kind: str
    warmup_steps: int
    decay_kind: str
    decay_steps: tuple[int, ...]
    decay_factor: float
    final_lr: float = 0.0
    """Where kind cosine ends."""
    loss_scale: float = 1.0
    """What the loss is multiplied by (1 unless `schedule.scale` is loss)."""

    def lr_at(self, step: int) -> float:
        """The learning rate of the update number `step` (0-based)."""
        if step < self.warmup_steps:
            if self.warmup_kind == "constant":
                return self.start_lr
            # §2.2: "a constant amount at each iteration", from η at step 0 to kη at step warmup_steps.
            return self.start_lr + (self.peak_lr - self.start_lr) * step / self.warmup_steps
        if self.decay_kind == "cosine":
            done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
            return self.final_lr + (self.peak_lr - self.final_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return self.peak_lr * self.decay_factor ** bisect.bisect_right(self.decay_steps, step)


def scale_factor(rule: str, global_batch: int, reference_batch: int) -> float:
    """What the rule multiplies the reference learning rate by: kn/256, its square root, or 1."""
    ratio = global_batch / reference_batch
    return {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]


def make_schedule(settings: ScheduleSettings, *, global_batch: int, steps_per_epoch: int) -> Schedule:
    """The schedule of `settings` in steps, for a minibatch of `global_batch` images."""

    def steps(epochs: float) -> int:
        return round(epochs * steps_per_epoch)

    factor = scale_factor(settings.lr_rule, global_batch, settings.reference_batch)
    lr_factor = factor if settings.scale == "lr" else 1.0
    peak_lr = settings.reference_lr * lr_factor
    # §5.1: warmup is for minibatches larger than the reference; at or below it there is nothing to warm up.
    start_lr = settings.reference_lr if settings.warmup.start_lr is None else settings.warmup.start_lr
    warms_up = settings.warmup.kind != "none" and peak_lr > start_lr
    decay = settings.decay
    return Schedule(
        start_lr=start_lr,
        peak_lr=peak_lr,
        total_steps=max(1, steps(settings.epochs)),
        warmup_kind=settings.warmup.kind if warms_up else "none",
        warmup_steps=steps(settings.warmup.epochs) if warms_up else 0,
        decay_kind=decay.kind,
        decay_steps=tuple(steps(e) for e in decay.epochs) if decay.kind == "step" else (),
        decay_factor=decay.factor,
        final_lr=decay.final_lr,
        loss_scale=factor if settings.scale == "loss" else 1.0,
    )
