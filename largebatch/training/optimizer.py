"""The optimizer of a config: SGD as the paper uses it (remark 2 of §3), LARS, AdamW or LAMB; clipping; its state."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import SGD, AdamW, Optimizer

from largebatch.training.groups import groups_of
from largebatch.training.layerwise import LAMB, LARS
from largebatch.training.momentum import LrInsideSGD
from largebatch.training.settings import OptimizerSettings


def make_optimizer(model: nn.Module, settings: OptimizerSettings, *, fused: bool = False) -> Optimizer:
    """The optimizer of `settings`; its learning rate is set at each step. Raises ConfigError (see `groups_of`).

    `fused` keeps the skipping of a step that overflowed (fp16) on the device, without a wait.
    """
    optimizer = _make(groups_of(model, settings), settings, fused or None)
    _start_buffers_at_zero(optimizer)
    if settings.clip_norm is not None or settings.clip_value is not None:
        optimizer.register_step_pre_hook(partial(_clip, settings))
    return optimizer


def _make(groups: list[dict[str, Any]], settings: OptimizerSettings, fused: bool | None) -> Optimizer:
    momentum, betas = settings.momentum, (settings.betas[0], settings.betas[1])
    if settings.kind == "adamw":
        return AdamW(groups, lr=0.0, betas=betas, eps=settings.epsilon, fused=fused)
    if settings.kind == "lamb":
        return LAMB(groups, betas=betas, epsilon=settings.epsilon)
    if settings.kind == "lars":
        return LARS(groups, momentum=momentum, trust_coefficient=settings.trust_coefficient)
    if settings.momentum_form == "lr_outside":
        # Nesterov's momentum of 0 is plain SGD, which torch refuses to spell so.
        return SGD(groups, lr=0.0, momentum=momentum, nesterov=settings.nesterov and momentum > 0, fused=fused)
    corrected = settings.momentum_form == "lr_inside"
    return LrInsideSGD(groups, momentum=momentum, nesterov=settings.nesterov, corrected=corrected)


def _start_buffers_at_zero(optimizer: Optimizer) -> None:
    """torch's fused SGD makes its buffers in the first step, and leaves them uninitialised if that overflows."""
    for group in optimizer.param_groups if isinstance(optimizer, SGD) else []:
        for parameter in group["params"] if group["fused"] and group["momentum"] else []:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _clip(settings: OptimizerSettings, optimizer: Optimizer, *_: object) -> None:
    """Before each update: limit the summed gradients, which are the same on all ranks, without a wait.

    They no longer carry the loss scale. Of a step that is left out they may be anything.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if settings.clip_value is not None:
        clip_grad_value_(parameters, settings.clip_value)
    if settings.clip_norm is not None:
        # A copy in one piece: where DDP lays a gradient depends on N, and with it, on GPUs, the order of a norm's sum.
        whole = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        norm = torch.linalg.vector_norm(whole, dtype=torch.float64).to(whole.dtype)
        clip_grads_with_norm_(parameters, settings.clip_norm, norm)


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the `state_dict` of an optimizer of the same settings, maybe of another kind of device.

    How an update is computed (fused or not) stays as this device wants it. Raises ValueError if it does not fit.
    """
    groups = state["param_groups"]
    if "fused" in optimizer.defaults and len(groups) == len(optimizer.param_groups):
        groups = [{**group, "fused": own["fused"]} for group, own in zip(groups, optimizer.param_groups, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    _start_buffers_at_zero(optimizer)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Use the learning rate `lr` in every group from the next update on, times the group's ``lr_scale`` if it has
    one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def update_unless(left_out: Tensor, optimizer: Optimizer) -> None:
    """Apply the update unless `left_out` (boolean, []).

    A fused optimizer reads the answer on the device, which is not waited for.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not left_out:
        optimizer.step()
