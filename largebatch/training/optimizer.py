"""SGD as the paper uses it: what is decayed (§5.3), and the two forms of momentum (remark 2 of §3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from largebatch.models.normalisation import batchnorm_modules
from largebatch.training.lars import LARS, lars_groups
from largebatch.training.momentum import LrInsideSGD
from largebatch.training.settings import OptimizerSettings


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_batchnorm: bool = False) -> list[dict[str, Any]]:
    """The trainable parameters of `model` as two groups for an optimizer: decayed, and BatchNorm's γ and β.

    BatchNorm is told by module type: names miss ``downsample.1``, and the number of dimensions spares
    ``fc.bias``, which the paper decays.
    """
    normalising = {id(p) for _, module in batchnorm_modules(model) for p in module.parameters(recurse=False)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in normalising], "weight_decay": weight_decay},
        {
            "params": [p for p in trainable if id(p) in normalising],
            "weight_decay": weight_decay if decay_batchnorm else 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, settings: OptimizerSettings, *, fused: bool = False) -> Optimizer:
    """The optimizer of `settings`; its learning rate is set at each step.

    `fused` keeps the skipping of a step that overflowed (fp16) on the device, without a wait.
    """
    if settings.kind == "lars":
        groups = lars_groups(model, settings.weight_decay)
        return LARS(groups, momentum=settings.momentum, trust_coefficient=settings.trust_coefficient)
    groups = parameter_groups(model, settings.weight_decay, decay_batchnorm=settings.decay_batchnorm)
    if settings.momentum_form == "lr_outside":
        # Nesterov's momentum of 0 is plain SGD, which torch refuses to spell so.
        nesterov = settings.nesterov and settings.momentum > 0
        optimizer = SGD(groups, lr=0.0, momentum=settings.momentum, nesterov=nesterov, fused=fused or None)
        _start_buffers_at_zero(optimizer)
        return optimizer
    corrected = settings.momentum_form == "lr_inside"
    return LrInsideSGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, corrected=corrected)


def _start_buffers_at_zero(optimizer: SGD) -> None:
    """torch's fused SGD makes its buffers in the first step, and leaves them uninitialised if that overflows."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["fused"] and group["momentum"] else []:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the `state_dict` of an optimizer of the same settings, maybe of another kind of device.

    How an update is computed (fused or not) stays as this device wants it. Raises ValueError if it does not fit.
    """
    fused = [group.get("fused") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if isinstance(optimizer, SGD):
        for group, own in zip(optimizer.param_groups, fused, strict=True):
            group["fused"] = own
        _start_buffers_at_zero(optimizer)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Use the learning rate `lr` in every group from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def update_unless(left_out: Tensor, optimizer: Optimizer) -> None:
    """Apply the update unless `left_out` (boolean, []).

    A fused optimizer reads the answer on the device, which is not waited for.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not left_out:
        optimizer.step()
