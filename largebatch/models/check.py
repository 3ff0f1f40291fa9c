"""What a model must be to be trained here, found before training: its tensors, and one forward and backward."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from largebatch.errors import ConfigError
from largebatch.wording import config_error, reason


def check_structure(model: nn.Module, name: str) -> None:
    """Raise ConfigError, which names `model.name` and the part, for what cannot be trained on any number of ranks."""

    def refuse(problem: str) -> ConfigError:
        return config_error("model.name", f"{name!r}", problem)

    for part, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise refuse(
                f"{part or 'the model'!r} is a SyncBatchNorm, which normalises the images of all ranks together, so "
                "that the result depends on their number; use BatchNorm, or batchnorm.over: pass"
            )
    memory: dict[int, str] = {}
    for part, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise refuse(f"has lazy layers, {part!r} for example; give them their sizes")
        if tensor.is_meta:
            raise refuse(f"{part!r} is on the meta device and has no values; build the model on the CPU")
    trainable = [(part, p) for part, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise refuse("has no parameters to train; at least one needs requires_grad")
    for part, parameter in trainable:
        if parameter.dtype not in (torch.float32, torch.float64) or parameter.dtype != trainable[0][1].dtype:
            raise refuse(
                f"the parameter {part!r} is {_dtype(parameter)}, and {trainable[0][0]!r} is {_dtype(trainable[0][1])}; "
                "all of them must be float32 (or all float64), real numbers; reduced precision is execution.precision"
            )
        if not parameter.isfinite().all():
            raise refuse(f"the parameter {part!r} has values that are not finite before training")
        other = memory.setdefault(parameter.data_ptr(), part) if parameter.numel() else part
        if other != part:
            raise refuse(
                f"the parameters {other!r} and {part!r} share their memory and would be updated twice; "
                "use one nn.Parameter in both places"
            )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_forward(
    model: nn.Module,
    name: str,
    *,
    classes: int,
    images: Tensor,
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
) -> None:
    """Run `images` through `model` as training and evaluation will, and leave it as it was.

    Raises ConfigError, which names `model.name`, unless the output is one tensor [n, classes] of finite numbers whose
    loss reaches every trainable parameter: DDP would wait for the gradients of those that it does not reach.
    """
    where = f"{name!r} on {len(images)} random image{'s' * (len(images) > 1)} {list(images.shape)}"
    with _unchanged(model, images.device):
        try:
            model.eval()
            with torch.no_grad(), autocast():
                evaluated = model(images)
            _check_output(evaluated, f"{where}, in evaluation mode", classes, len(images))
            model.train()
            with autocast():
                trained = model(images)
            _check_output(trained, where, classes, len(images))
            labels = torch.arange(len(images), device=images.device) % classes
            torch.nn.functional.cross_entropy(trained.float(), labels).backward()
        except ConfigError:
            raise
        except Exception as error:
            raise config_error("model.name", where, _why(error)) from error
        unused = [part for part, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        raise config_error(
            "model.name",
            f"{where}: the loss does not depend on the parameter {unused[0]!r}"
            + (f" and {len(unused) - 1} more" if len(unused) > 1 else "")
            + "; remove what is never used, or set its requires_grad to False",
        )


def _why(error: Exception) -> str:
    if "Expected more than 1 value per channel" in str(error):
        return (
            "a BatchNorm has a single value per channel to normalise (maps of 1 x 1 pixel and 1 image); raise "
            "batch.images_per_worker to 2 or more, or use larger images"
        )
    return f"its forward or backward failed: {reason(error)}"


def _check_output(output: Any, where: str, classes: int, count: int) -> None:
    if not isinstance(output, Tensor):
        raise config_error(
            "model.name",
            f"{where}: the output is a {type(output).__name__}, not one tensor [{count}, {classes}]; return the logits "
            "alone (models with several classifiers often have an argument for that, such as aux_logits: false)",
        )
    if list(output.shape) != [count, classes] or not output.is_floating_point():
        raise config_error(
            "model.name",
            f"{where}: the output is {_dtype(output)} {list(output.shape)}, and [{count}, {classes}] is needed for "
            f"{classes} classes; let your function accept `classes`, or set its own argument in model.arguments",
        )
    if not output.isfinite().all():
        raise config_error(
            "model.name", f"{where}: the output has values that are not finite before training; check its weights"
        )


@contextlib.contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards parameters, buffers, modes, attributes and generators are as before, and no gradient is left."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [dict(vars(module)) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, own, held in zip(modules, attributes, buffers, strict=True):
            vars(module).clear()
            vars(module).update(own)
            module._buffers.clear()
            module._buffers.update(held)
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
                tensor.grad = None
