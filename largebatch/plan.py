"""Every derived number of a run, each with the rule that it came from.

The answer to "what learning rate for this batch on these GPUs, and why".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from largebatch.config import Config
from largebatch.data.settings import FROM_FILES
from largebatch.recipe.batch import deal_by_speed, deal_equally
from largebatch.recipe.efficiency import images_factor, steps_factor
from largebatch.recipe.order import EpochOrder
from largebatch.recipe.resize import Resize, ResizedOrder, resized_schedule
from largebatch.recipe.schedule import Schedule, make_schedule
from largebatch.report.noise import NoiseScale
from largebatch.training.settings import LossSettings, OptimizerSettings

_LIMIT_OF_LINEAR_RULE = 8192  # §5.2: curves match the baseline up to 8k and leave it from 16k on
_WORKER_OF_THE_PAPER = 32
_SHORT_WARMUP = 100
_LR_OF_SGD = 0.05
_DECAY_OF_ADAM = 0.005


@dataclass(frozen=True)
class Plan:
    """What a config means for N ranks. All counts are images, steps or virtual workers."""

    name: str
    world_size: int
    virtual_workers: int
    workers_per_rank: int | None
    """Where k follows N: virtual workers for each rank."""
    images_per_worker: int
    global_batch: int
    workers_per_pass: int
    workers_on_rank: list[int]
    images_on_rank: list[int]
    train_images: int
    val_images: int
    steps_per_epoch: int
    dropped_images: int
    repeats: int
    """Times that an image comes in an epoch, if it is not dropped (repeated augmentation)."""
    total_steps: int
    reference_lr: float
    reference_batch: int
    lr_rule: str
    lr_explanation: str
    peak_lr: float
    warmup_kind: str
    warmup_start_lr: float
    warmup_steps: int
    decay_kind: str
    decay_steps: list[int]
    weight_decay: float
    optimizer: str
    """What differs from the paper's SGD, in words."""
    loss: str
    """In words; empty for plain cross-entropy."""
    reduction: str
    image_size: int | None
    """Pixels of an image from a file as the model sees it; None for other sets."""
    progressive_resizing: list[list[int]]
    """[epoch, pixels]: in training, from that epoch on."""
    val_image_size: int | None
    resize_size: int | None
    resize_step: int | None
    """The step from which on `batch.on_resize: rescale` gave this minibatch to a run that began with another."""
    warnings: list[str]

    order: EpochOrder
    schedule: Schedule
    resize: Resize | None
    """Given where `batch.on_resize: rescale` gave this minibatch to a run that began with another."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `plan.json`, without what the plan carries to the trainer."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("order", "schedule", "resize")}


def make_plan(
    config: Config, *, name: str, world_size: int, train_images: int, val_images: int, resize: Resize | None = None
) -> Plan:
    """The plan of `config` on `world_size` ranks for a set of this many images. Raises ConfigError.

    With `resize`, `config` has the k from there on; steps are counted from the run's start.
    """
    batch = config.batch
    workers = deal_equally(batch.dealt_workers, config.execution.workers_per_pass, world_size).workers_on_rank()
    order = make_order(config, train_images, resize)
    schedule = run_schedule(config, order, resize)
    from_files = config.data.name in FROM_FILES
    return Plan(
        name=name,
        world_size=world_size,
        virtual_workers=batch.virtual_workers,
        workers_per_rank=batch.workers_per_rank,
        images_per_worker=batch.images_per_worker,
        global_batch=batch.global_batch,
        workers_per_pass=config.execution.workers_per_pass,
        workers_on_rank=workers,
        images_on_rank=[count * batch.images_per_worker for count in workers],
        train_images=train_images,
        val_images=val_images,
        steps_per_epoch=order.steps_per_epoch,
        dropped_images=order.dropped_images,
        repeats=order.repeats,
        total_steps=schedule.total_steps,
        reference_lr=config.schedule.reference_lr,
        reference_batch=config.schedule.reference_batch,
        lr_rule=config.schedule.lr_rule,
        lr_explanation=_explain_lr(config, schedule),
        peak_lr=schedule.peak_lr,
        warmup_kind=schedule.warmup_kind,
        warmup_start_lr=schedule.start_lr,
        warmup_steps=schedule.warmup_steps,
        decay_kind=schedule.decay_kind,
        decay_steps=list(schedule.decay_steps),
        weight_decay=config.optimizer.weight_decay,
        optimizer=_explain_optimizer(config.optimizer),
        loss=_explain_loss(config.loss),
        reduction=config.execution.reduction,
        image_size=config.data.image_size if from_files else None,
        progressive_resizing=config.data.progressive_resizing,
        val_image_size=config.data.val_size if from_files else None,
        resize_size=config.data.short_side if from_files else None,
        resize_step=resize.step if resize else None,
        warnings=_warnings(config, schedule, workers),
        order=order,
        schedule=schedule,
        resize=resize,
    )


def make_order(config: Config, train_images: int, resize: Resize | None = None) -> EpochOrder:
    """The order of the training images. Raises ConfigError if a minibatch is larger than the set."""
    k, n, shuffle = config.batch.dealt_workers, config.batch.images_per_worker, config.batch.shuffle
    repeats = config.data.augmentation.repeats
    if resize is not None:
        return ResizedOrder(train_images, k, n, config.seed, repeats=repeats, resize=resize)
    return EpochOrder(train_images, k, n, config.seed, shuffle=shuffle, repeats=repeats)


def run_schedule(config: Config, order: EpochOrder, resize: Resize | None = None) -> Schedule:
    """The schedule of a run in this order of images."""
    settings = config.schedule
    recipe = make_schedule(settings, global_batch=config.batch.global_batch, steps_per_epoch=order.steps_per_epoch)
    if resize is None:
        return recipe
    return resized_schedule(recipe, resize, round(settings.resize_ramp_epochs * order.steps_per_epoch))


def _explain_lr(config: Config, schedule: Schedule) -> str:
    s, batch, kind = config.schedule, config.batch.global_batch, config.optimizer.kind
    ratio = f"{batch}/{s.reference_batch}"
    if s.scale == "loss":
        return f"{s.reference_lr:g}: the factor scales the loss instead (remark 1 of §3 done wrong)"
    usual = (
        f", usual for {kind}, whose update has the same size for any gradient (You et al. 2020, Malladi et al. 2022)"
    )
    rule = {
        "linear": f"{s.reference_lr:g} x {ratio}: the linear scaling rule (§2.1)",
        "sqrt": f"{s.reference_lr:g} x sqrt({ratio}): the square-root rule"
        + (usual if config.optimizer.adaptive else " (an ablation, Table 2a)"),
        "none": f"{s.reference_lr:g} for any minibatch: not scaled (an ablation, Table 2a)",
    }
    return rule[s.lr_rule]


def _explain_optimizer(optimizer: OptimizerSettings) -> str:
    """What differs from the paper's SGD; empty if nothing does."""
    parts = []
    if optimizer.kind != "sgd":
        parts.append(
            f"{optimizer.kind}, weight decay {optimizer.weight_decay:g} (except normalisation layers and biases)"
        )
    if optimizer.clip_norm is not None:
        parts.append(f"gradients clipped to norm {optimizer.clip_norm:g}")
    if optimizer.clip_value is not None:
        parts.append(f"gradients clipped to ±{optimizer.clip_value:g}")
    if optimizer.layer_decay < 1:
        parts.append(f"learning rate x {optimizer.layer_decay:g} from each layer to the one before it")
    return ", ".join(parts)


def _explain_loss(loss: LossSettings) -> str:
    """The loss, where it is not plain cross-entropy; else empty."""
    parts = [] if loss == LossSettings() else [loss.name]
    if loss.label_smoothing:
        parts.append(f"label smoothing {loss.label_smoothing:g}")
    if loss.target_threshold is not None:
        parts.append(f"targets above {loss.target_threshold:g} count as 1")
    return ", ".join(parts)


def _warnings(config: Config, schedule: Schedule, workers: list[int]) -> list[str]:
    batch = config.batch
    warnings = []
    if batch.global_batch > _LIMIT_OF_LINEAR_RULE and config.optimizer.kind == "sgd":
        warnings.append(
            f"the minibatch of {batch.global_batch} is beyond {_LIMIT_OF_LINEAR_RULE}: in the paper the linear rule "
            "with plain SGD loses accuracy from 16k on (Figure 1); expect a higher error"
        )
    if batch.images_per_worker != _WORKER_OF_THE_PAPER:
        warnings.append(
            f"images_per_worker is {batch.images_per_worker}, not the paper's {_WORKER_OF_THE_PAPER}: n decides what "
            "BatchNorm normalises together, so the small-batch reference must use the same n to be comparable (§2.3)"
        )
    if 0 < schedule.warmup_steps < _SHORT_WARMUP:
        warnings.append(
            f"the warmup has only {schedule.warmup_steps} steps (the paper's has 780 at a minibatch of 8192): each "
            "raises the learning rate a lot; if the loss jumps, warm up for more epochs"
        )
    if len(set(workers)) > 1:
        warnings.append(
            f"{batch.virtual_workers} virtual workers on {len(workers)} ranks are dealt unevenly "
            f"({max(workers)} on some, {min(workers)} on others): the result is the same, but ranks with fewer wait"
        )
    return warnings + [text for odd, text in _odd_combinations(config, schedule) if odd]


def _odd_combinations(config: Config, schedule: Schedule) -> list[tuple[bool, str]]:
    """What is allowed and rarely meant: whether it is so here, and a warning."""
    optimizer, s = config.optimizer, config.schedule
    kind, adaptive, decay = optimizer.kind, optimizer.adaptive, optimizer.weight_decay
    how = config.data.augmentation
    weights = config.model.init_from or config.model.arguments.get("weights")
    return [
        (
            adaptive and s.lr_rule == "linear",
            f"schedule.lr_rule linear is for SGD; {kind}'s update does not grow with the gradient, and its learning "
            "rate usually grows with the square root of kn (schedule.lr_rule=sqrt)",
        ),
        (
            adaptive and s.reference_lr >= _LR_OF_SGD,
            f"schedule.reference_lr {s.reference_lr:g} is typical of SGD; {kind} usually takes 0.0001 to 0.01",
        ),
        (
            adaptive and schedule.warmup_steps == 0,
            f"{kind} starts at its peak learning rate, without a warmup, which often diverges; set "
            "schedule.warmup.start_lr to warm up at this minibatch too",
        ),
        (
            adaptive and 0 < decay < _DECAY_OF_ADAM,
            f"optimizer.weight_decay {decay:g} is typical of SGD; {kind} multiplies it by the learning rate again, and "
            "usually takes 0.01 to 0.1",
        ),
        (
            kind == "sgd" and decay >= _DECAY_OF_ADAM,
            f"optimizer.weight_decay {decay:g} is typical of AdamW; the paper's SGD takes 0.0001",
        ),
        (
            optimizer.layer_decay < 1 and not weights,
            f"optimizer.layer_decay {optimizer.layer_decay:g} keeps the first layers near where they start, which is "
            "random here; it is for weights to start from (model.init_from)",
        ),
        (
            adaptive and s.scale == "loss",
            f"schedule.scale loss does nothing here: {kind}'s update does not grow with the loss",
        ),
        (
            config.loss.target_threshold is not None and not (how.mixes or config.loss.label_smoothing),
            f"loss.target_threshold {config.loss.target_threshold} does nothing: without mixup or CutMix targets are 0 "
            "or 1",
        ),
        (
            (config.ema.decay or 0) > 1 - 1 / schedule.total_steps and not config.ema.warmup,
            f"ema.decay {config.ema.decay} averages over more updates than the run's {schedule.total_steps}, so that "
            "the average stays near the start; lower it, or let it warm up (ema.warmup)",
        ),
        (
            config.loss.name == "bce" and kind == "sgd",
            "loss bce is averaged over the classes, so its gradients are smaller than of cross_entropy; SGD needs "
            "a larger schedule.reference_lr for it, adamw and lamb do not",
        ),
    ]


def describe_limit(plan: Plan, whole: NoiseScale, thirds: Sequence[NoiseScale]) -> str:
    """Which minibatch is still efficient by the gradient noise scale of a run planned as `plan`, and why."""
    if whole.images is None:
        return (
            f"gradient noise scale  unknown: over steps {whole.first_step} to {whole.last_step} the noise hides the "
            "gradient; measure for longer, or more often"
        )
    limit = whole.images
    by_thirds = ", ".join("unknown" if third.images is None else f"{third.images:.0f}" for third in thirds)
    below = [plan.reference_batch * 2**i for i in range(40) if plan.reference_batch * 2**i <= limit]
    advised = f"up to {below[-1]}" if below else f"none of {plan.reference_batch} or more"
    lines = [
        f"gradient noise scale  {limit:.0f} images over steps {whole.first_step} to {whole.last_step} "
        f"(by thirds {by_thirds})",
        f"still efficient kn    {advised}: at the noise scale, a gradient's noise is as large as the gradient, so that "
        "the same progress",
        "                      takes twice the images of the smallest minibatches, and twice the steps of the largest",
        "kn          images needed   steps needed (McCandlish et al. 2018: 1 + kn/B and 1 + B/kn)",
    ]
    shown = {plan.global_batch, *(plan.reference_batch * 2**i for i in range(-1, 40))}
    for kn in sorted(kn for kn in shown if limit / 16 <= kn <= limit * 16 or kn == plan.global_batch):
        note = "   this run" if kn == plan.global_batch else ""
        lines.append(f"{kn:<11g} {images_factor(kn, limit):<15.2f} {steps_factor(kn, limit):.2f}{note}")
    return "\n".join(lines)


def dealt_by_speed(plan: Plan, speeds: Sequence[float]) -> dict[str, Any]:
    """How `execution.deal: measured` would deal to ranks of these relative speeds, and what a step would then take.

    Steps are in passes of a rank of speed 1; what a rank does besides its passes is left out.
    """
    equal = deal_equally(plan.virtual_workers, plan.workers_per_pass, len(speeds))
    of_a_pass = [1 / speed for speed in speeds]
    dealt = deal_by_speed(equal, of_a_pass)
    return {
        "speeds": list(speeds),
        "workers_on_rank": dealt.workers_on_rank(),
        "step_passes": dealt.seconds(of_a_pass),
        "step_passes_dealt_equally": equal.seconds(of_a_pass),
    }


def describe_deal(dealt: dict[str, Any]) -> str:
    """The same in words."""
    now, before = dealt["step_passes"], dealt["step_passes_dealt_equally"]
    return (
        f"dealt by speed      {', '.join(map(str, dealt['workers_on_rank']))} virtual workers, the same bits "
        "(execution.deal: measured)\n"
        f"expected step       as long as {now:.3g} passes at speed 1, dealt equally {before:.3g}: "
        f"{before / now:.2f} x the images/s"
    )


def describe(plan: Plan) -> str:
    """The plan as the block of text that `plan` and `train` print."""
    warmup = (
        f"{plan.warmup_steps} steps, {plan.warmup_kind}, from {plan.warmup_start_lr:g} to {plan.peak_lr:g}"
        if plan.warmup_steps
        else "none"
    )
    decay = (
        f"at steps {', '.join(map(str, plan.decay_steps))}"
        if plan.decay_kind == "step" and plan.decay_steps
        else plan.decay_kind
        if plan.decay_kind == "cosine"
        else "none"
    )
    follows = f" ({plan.workers_per_rank} for each of the ranks)" if plan.workers_per_rank else ""
    rows = [
        (
            "minibatch kn",
            f"{plan.global_batch} = {plan.virtual_workers} virtual workers{follows} x {plan.images_per_worker} images",
        ),
        (
            "ranks N",
            f"{plan.world_size}, each running {_each(plan.workers_on_rank)} virtual workers "
            f"({_each(plan.images_on_rank)} images) per step",
        ),
        (
            "training images",
            f"{plan.train_images}, of which each epoch drops {plan.dropped_images}"
            + (f" and shows the others {plan.repeats} times" if plan.repeats > 1 else ""),
        ),
        ("steps", f"{plan.total_steps}, {plan.steps_per_epoch} per epoch"),
        ("peak learning rate", f"{plan.peak_lr:g} = {plan.lr_explanation}"),
        ("warmup", warmup),
        ("decay", decay),
        *((label, text) for label, text in (("optimizer", plan.optimizer), ("loss", plan.loss)) if text),
        ("reduction", plan.reduction),
    ]
    if plan.image_size is not None:
        stages = "".join(f", {size} from epoch {epoch}" for epoch, size in plan.progressive_resizing)
        val = f" {plan.val_image_size} pixels" if plan.val_image_size != plan.image_size else ""
        row = f"{plan.image_size} pixels{stages}; in validation the centre{val}, with the short side resized to "
        row += str(plan.resize_size)
        rows.insert(3, ("image files", row))
    if plan.resize_step is not None:
        rows.append(("resized", f"this minibatch holds from step {plan.resize_step} on (batch.on_resize: rescale)"))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {text}" for label, text in rows]
    return "\n".join([f"plan of {plan.name}", *lines, *(f"warning: {w}" for w in plan.warnings)])


def _each(counts: list[int]) -> str:
    """``4`` or ``3 or 2``: what every rank has, or the values that occur."""
    return " or ".join(str(count) for count in sorted(set(counts), reverse=True))
