"""The config sections of training. Free of torch, so that reading a config stays fast."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from largebatch.importing import check_import_path
from largebatch.section import FreeOnResume, Section


class LossSettings(Section):
    """What is minimised: the mean of a loss over all kn images of a step."""

    name: str = "cross_entropy"
    """cross_entropy; bce: binary cross-entropy of each class against all others, averaged over the classes (Wightman
    et al. 2021); or your own function or class as `package.module:function`, called with logits and targets."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over all classes (cross_entropy, bce)."""
    target_threshold: float | None = Field(None, ge=0, lt=1)
    """bce: a class counts as fully present where its target is above this; null leaves blended targets as they are."""
    arguments: dict[str, Any] = Field(default={})
    """Keyword arguments for your own function or class."""

    @model_validator(mode="after")
    def _no_idle_key(self) -> LossSettings:
        own = self.name not in ("cross_entropy", "bce")
        if own and ":" not in self.name:
            raise ValueError(f"name: {self.name!r} is not cross_entropy or bce (your own: package.module:function)")
        if own:
            check_import_path(self.name)
        if own and self.label_smoothing:
            raise ValueError(f"label_smoothing: {self.name} does not take it; give it in arguments, under its own name")
        if self.target_threshold is not None and self.name != "bce":
            raise ValueError(f"target_threshold: {self.target_threshold:g} is for bce; {self.name} does not take it")
        if self.arguments and not own:
            raise ValueError(f"arguments: {self.name} takes none; seen {', '.join(self.arguments)}")
        return self


_KINDS_OF = {
    "trust_coefficient": ("lars",),
    "momentum": ("sgd", "lars"),
    "nesterov": ("sgd", "lars"),
    "decay_batchnorm": ("sgd",),
    "momentum_form": ("sgd",),
    "betas": ("adamw", "lamb"),
    "epsilon": ("adamw", "lamb"),
}
"""Keys that only some kinds of optimizer take."""


class OptimizerSettings(Section):
    """How gradients become updates: optimizer, weight decay, clipping, and learning rate per layer."""

    kind: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"
    """sgd: the paper's; lars: each layer's update scaled by its trust ratio (You et al. 2017), momentum with the
    learning rate inside; adamw: torch.optim.AdamW (Loshchilov & Hutter 2019); lamb: Adam's update scaled by each
    layer's trust ratio (You et al. 2020). All but sgd neither decay nor scale normalisation layers, biases and other
    parameters of one dimension."""
    trust_coefficient: float = Field(0.001, gt=0)
    """lars: the trust ratio is this times |w| / (|g| + λ|w|)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """m: the share of the old update in the new one (sgd, lars)."""
    nesterov: bool = True
    """Nesterov's form of momentum (sgd)."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """β1 and β2: the shares of the old averages of the gradient and of its square (adamw, lamb)."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the averaged square (adamw, lamb)."""
    weight_decay: float = Field(1e-4, ge=0, le=1e6)
    """λ. sgd, lars: the loss has λ/2 times the squared norm of the decayed weights added (§5.1: 1e-4); adamw, lamb:
    each update also takes the learning rate times λ off the weights themselves (often 0.01 to 0.1)."""
    decay_batchnorm: bool = False
    """Decay BatchNorm's γ and β too: the paper does not, many codebases do."""
    no_decay: list[str] = Field(default=[])
    """Names of more parameters and modules that are not decayed, such as `pos_embedding` or `*.class_token`."""
    momentum_form: Literal["lr_outside", "lr_inside", "lr_inside_uncorrected"] = "lr_outside"
    """lr_outside: PyTorch's form (9), which needs no correction; lr_inside: form (10) with momentum correction;
    lr_inside_uncorrected: form (10) without, which is remark 2 done wrong."""
    clip_norm: float | None = Field(None, gt=0)
    """Scale the gradient of the whole minibatch down to this norm (over all parameters) where it is larger."""
    clip_value: float | None = Field(None, gt=0)
    """Limit each element of the gradient of the whole minibatch to this absolute value."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """The learning rate of a layer is this times that of the layer after it; the head's is the schedule's."""

    @model_validator(mode="after")
    def _no_idle_key(self) -> OptimizerSettings:
        for key, kinds in _KINDS_OF.items():
            value, default = getattr(self, key), type(self).model_fields[key].default
            if self.kind not in kinds and value != default:
                raise ValueError(f"{key}: {value!r} is for kind {' or '.join(kinds)}; {self.kind} does not take it")
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("clip_norm and clip_value: give one of them")
        return self

    @property
    def adaptive(self) -> bool:
        """Whether updates are divided by a running size of the gradient, as Adam's are."""
        return self.kind in ("adamw", "lamb")


class EmaSettings(Section):
    """An exponential moving average of the weights, evaluated and exported in addition to the trained weights."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Weight of the old average at each update (0.9999 is usual with some 100,000 updates); null for no average."""
    warmup: bool = True
    """Start with a smaller decay: at update t at most 1 - t^(-2/3), as timm's `--model-ema-warmup`."""


class BatchNormSettings(Section):
    """BatchNorm's running statistics and what evaluation uses."""

    momentum: float = Field(0.9, ge=0, lt=1)
    """Weight of the old running average at each step, as in the paper (PyTorch's `momentum` is 1 minus this)."""
    over: Literal["worker", "pass"] = "worker"
    """Whose images are normalised together. worker: those of each virtual worker, n of them (§2.3); pass: those of all
    `execution.workers_per_pass` workers of a pass, as a single process with that many images would (an ablation)."""
    statistics: Literal["running", "precise"] = "running"
    """running: the running average; precise: recomputed with the current weights before each evaluation."""
    precise_steps: int = Field(20, ge=1)
    """`precise` averages over the images of this many newest steps."""


class DelaySettings(Section):
    """Sleeps in passes, to rehearse slow ranks; they change no number. All off by default."""

    seconds: float = Field(0.0, ge=0, le=3600)
    """How long each rank sleeps in each pass, in addition to computing."""
    slow_ranks: list[Annotated[int, Field(ge=0)]] = Field(default=[])
    """Ranks that always sleep `slow_factor` times as long."""
    slow_factor: float = Field(1.5, ge=0)
    """How many times as long the `slow_ranks` sleep."""
    rare_share: float = Field(0.0, ge=0, le=1)
    """The share of all ranks' steps in which a rank sleeps `rare_factor` times as long."""
    rare_factor: float = Field(2.0, ge=0)
    """How many times as long a rank sleeps in a rare slow step."""
    jitter: float = Field(0.0, ge=0)
    """Standard deviation of each pass's sleep, as a share of it (normal, never below 0)."""


class ExecutionSettings(Section):
    """Device, precision, and how the ranks cooperate."""

    device: FreeOnResume[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: the GPUs if there are any."""
    backend: FreeOnResume[Literal["auto", "nccl", "gloo"]] = "auto"
    """How the ranks communicate. auto: nccl if every rank of a machine has its own GPU, else gloo."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32; bf16: autocast; fp16: autocast with dynamic loss scaling."""
    tf32: bool = False
    """On GPUs, let fp32 round its factors to 10 bits, which is faster; part of the rounding."""
    channels_last: bool = False
    """Keep images and weights in the memory order NHWC, which tensor cores and bf16 prefer."""
    compile: bool = False
    """Run the model through torch.compile."""
    reduction: Literal["reproducible", "fast"] = "reproducible"
    """reproducible: bit-identical weights on any number of ranks; fast: the backend's own all-reduce, equal up
    to rounding."""
    workers_per_pass: int = Field(1, ge=1)
    """Virtual workers per forward and backward pass; divides batch.virtual_workers. Part of the rounding, like
    the precision: keep it when you change the number of ranks."""
    deal: FreeOnResume[Literal["equal", "measured"]] = "equal"
    """How many virtual workers each rank runs. equal: the same number; measured: faster ranks run more, so that no
    rank waits for a slow one (see docs/stragglers.md). The weights are the same."""
    threads: int = Field(1, ge=1, le=1024)
    """Intra-op threads of each rank. Part of the rounding on CPUs, so it comes from here and not from
    OMP_NUM_THREADS; to use more cores, start more ranks instead."""
    bucket_mb: FreeOnResume[float | None] = Field(None, gt=0)
    """Size of DDP's gradient buckets, in MiB; null for DDP's default: a small first bucket, then 25."""
    static_graph: FreeOnResume[bool] = False
    """Tell DDP that every step runs the same graph; only if each rank runs one pass per step."""
    gradient_as_bucket_view: FreeOnResume[bool] = False
    """Store gradients in DDP's buckets, which saves a copy."""
    compression: Literal["none", "fp16", "bf16"] = "none"
    """Round gradients to 16 bits before they are sent and added: half the bytes, different numbers. Needs
    `reduction: fast`, since a rank rounds what it has added up, which depends on the number of ranks."""
    delays: FreeOnResume[DelaySettings] = DelaySettings()
    timeout_minutes: FreeOnResume[float] = Field(10.0, gt=0, le=1e6)
    """How long a rank waits for others that make no progress before it reports them and exits."""

    @model_validator(mode="after")
    def _compression_fits(self) -> ExecutionSettings:
        if self.compression != "none" and self.reduction != "fast":
            raise ValueError(
                f"compression {self.compression} needs reduction: fast; with reproducible, the weights would depend on "
                "the number of ranks"
            )
        return self


class EvaluationSettings(Section):
    """When and how the validation set is evaluated."""

    every_epochs: float = Field(1.0, gt=0)
    """Evaluate every N epochs, and at the end."""
    images_per_batch: int = Field(500, ge=1)
    """Images evaluated together; the same on any number of ranks."""


class CheckpointSettings(Section):
    """When the state of the training is written to disk."""

    every_epochs: float | None = Field(1.0, gt=0)
    """Checkpoint every N epochs; null disables this (the last step is always checkpointed)."""
    every_steps: int | None = Field(None, ge=1)
    """Also checkpoint every N steps."""
    every_minutes: float | None = Field(None, gt=0)
    """Also checkpoint every N minutes; the ranks agree on the step."""
    on_error: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written (disk full): stop, or warn and continue."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept; with 2, there is one to fall back to if the newest is damaged."""
    keep_best: Literal["val/top1_error", "val/loss", "val/ema_top1_error", "val/ema_loss"] | None = None
    """Also keep, in model_best.pt, the weights of the evaluation with the lowest value of this metric: those that are
    trained, or with `val/ema_…` their average."""


class HealthSettings(Section):
    """What is monitored during training, and how the run reacts."""

    on_not_finite: Literal["stop", "skip"] = "stop"
    """For a loss or gradient that is not finite. Its update is never applied; then stop (exit status 3), or skip to
    the next step and count it (`skipped_steps` in the metrics)."""
    replica_check_every_steps: int = Field(200, ge=0)
    """Compare a checksum of weights, optimizer state and BatchNorm statistics across ranks every N steps
    and before each checkpoint; 0 for never."""
    straggler_factor: float = Field(1.5, gt=1)
    """Report a rank that is this many times slower per pass than the median of the others."""


class LoggingSettings(Section):
    """When metrics are read from the device and written."""

    every_steps: int = Field(20, ge=1)
    """Write a metrics record every N steps, at each evaluation and at the end."""
    writers: list[Annotated[str, AfterValidator(check_import_path)]] = Field(default=[])
    """Other places for the records: `package.module:function`, called on rank 0 with (run folder, config), returns an
    object with `write(record)` and `close()`."""
    sample_images: int = Field(16, ge=0)
    """Images of the first virtual worker that samples.png shows, as the model gets them; 0 for no such file."""
    noise_scale_every_steps: int = Field(0, ge=0)
    """Measure the gradient noise scale every N steps, from which `plan --from RUN` derives the useful minibatch; 0 for
    never. Needs `execution.reduction: reproducible` and at least two passes per step."""
