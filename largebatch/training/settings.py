"""The config sections of training. Free of torch, so that reading a config stays quick."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from largebatch.section import Section


class OptimizerSettings(Section):
    """Momentum SGD with weight decay."""

    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(1e-4, ge=0, le=1e6)
    decay_batchnorm: bool = False
    """Decay BatchNorm's γ and β too: the paper does not, many codebases do."""
    momentum_form: Literal["lr_outside", "lr_inside", "lr_inside_uncorrected"] = "lr_outside"
    """lr_outside: PyTorch's form (9), which needs no correction; lr_inside: form (10) with momentum correction;
    lr_inside_uncorrected: form (10) without, which is remark 2 done wrong."""


class BatchNormSettings(Section):
    """BatchNorm's running statistics and what evaluation uses."""

    momentum: float = Field(0.9, ge=0, lt=1)
    """Weight of the old running average at each step, as in the paper (PyTorch's `momentum` is 1 minus this)."""
    statistics: Literal["running", "precise"] = "running"
    """running: the running average; precise: recomputed with the current weights before each evaluation."""
    precise_steps: int = Field(20, ge=1)
    """Steps' worth of images that `precise` averages over."""


class ExecutionSettings(Section):
    """Device, precision, and how the ranks work together."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32; bf16: autocast; fp16: autocast with dynamic loss scaling."""
    channels_last: bool = False
    compile: bool = False
    """Run the model through torch.compile."""
    reduction: Literal["reproducible", "fast"] = "reproducible"
    """reproducible: bit-identical weights on any number of ranks; fast: the backend's own all-reduce, equal up
    to rounding."""
    workers_per_pass: int = Field(1, ge=1)
    """Virtual workers in one forward and backward; divides batch.virtual_workers. Part of the rounding, like
    the precision: keep it when you change the number of ranks."""
    threads: int = Field(1, ge=1, le=1024)
    """Intra-op threads of each rank. Part of the rounding on CPUs, so it comes from here and not from
    OMP_NUM_THREADS; to use more cores, rather start more ranks."""
    bucket_mb: float = Field(25.0, gt=0)
    """Size of DDP's gradient buckets, in MiB."""
    timeout_minutes: float = Field(10.0, gt=0, le=1e6)
    """How long a rank waits for the others before it gives up."""


class EvaluationSettings(Section):
    """When and how the validation set is evaluated."""

    every_epochs: float = Field(1.0, gt=0)
    images_per_batch: int = Field(500, ge=1)
    """Images evaluated together; the same on any number of ranks."""


class CheckpointSettings(Section):
    """When the state of the training is written to disk."""

    every_epochs: float | None = Field(1.0, gt=0)
    """Write a checkpoint each so many epochs; null for none but `every_steps` and the last."""
    every_steps: int | None = Field(None, ge=1)
    """Write a checkpoint each so many steps besides."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept; with 2, a damaged one falls back to the one before."""


class LoggingSettings(Section):
    """How often metrics are read from the device and written."""

    every_steps: int = Field(20, ge=1)
