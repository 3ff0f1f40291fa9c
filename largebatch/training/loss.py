"""The loss of a config: cross-entropy, binary cross-entropy, or the user's own, which is tried before training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.data.pictures import describe
from largebatch.importing import import_object
from largebatch.training.settings import LossSettings
from largebatch.wording import config_error, reason

Loss = Callable[[Tensor, Tensor], Tensor]
"""From the logits [n, classes] of a pass and its targets, classes int64 [n] or probabilities float32 [n, classes], to
the mean over its n images."""


def make_loss(settings: LossSettings, *, classes: int, images: int, soft: bool, device: torch.device) -> Loss:
    """The loss of `settings`, for passes of `images` whose targets are probabilities if `soft`.

    Raises ConfigError, which names `loss.name`, for a function of the user's that cannot be imported or called, or does
    not return one finite number for the images or for each of them, with a gradient.
    """
    if settings.name == "cross_entropy":
        return partial(F.cross_entropy, label_smoothing=settings.label_smoothing)
    if settings.name == "bce":
        return partial(_binary, smoothing=settings.label_smoothing, threshold=settings.target_threshold)
    own = _own(settings, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _try(own, settings.name, classes, images, soft, device)
    return lambda logits, targets: own(_full(logits), targets).mean()


def _binary(logits: Tensor, targets: Tensor, *, smoothing: float, threshold: float | None) -> Tensor:
    """Binary cross-entropy, the mean over images and classes, as in "ResNet strikes back" (arXiv 2110.00476)."""
    classes = logits.shape[1]
    wanted = (F.one_hot(targets, classes) if targets.ndim == 1 else targets).to(_full(logits).dtype)
    wanted = wanted * (1 - smoothing) + smoothing / classes
    if threshold is not None:
        wanted = (wanted > threshold).to(wanted.dtype)
    return F.binary_cross_entropy_with_logits(_full(logits), wanted)


def _full(logits: Tensor) -> Tensor:
    """float32 where autocast made less of it."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _own(settings: LossSettings, device: torch.device) -> Callable[..., Any]:
    found = import_object(settings.name, "loss.name")
    if not callable(found):
        raise config_error("loss.name", f"{settings.name!r} is not a function or class")
    if not isinstance(found, type):
        return partial(found, **settings.arguments)
    try:
        made = found(**settings.arguments)
    except Exception as error:
        raise config_error("loss.name", f"{settings.name!r} with {settings.arguments}", reason(error)) from error
    if isinstance(made, nn.Module):
        made.to(device)
        if any(True for _ in made.parameters()):
            raise config_error(
                "loss.name", f"{settings.name!r} has parameters, which nothing trains; make them part of the model"
            )
    if not callable(made):
        raise config_error("loss.name", f"{settings.name!r} makes a {type(made).__name__}, which cannot be called")
    return made


def _try(own: Callable[..., Any], name: str, classes: int, images: int, soft: bool, device: torch.device) -> None:
    """Raise ConfigError unless `own` gives what training needs, for random logits."""
    logits = torch.randn(images, classes, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    labels = torch.arange(images, device=device) % classes
    targets = F.one_hot(labels, classes).float() if soft else labels
    what = f"targets float32 {list(targets.shape)}" if soft else f"targets int64 {list(targets.shape)}"
    where = f"{name!r} on random logits {list(logits.shape)} and {what}"

    def refuse(problem: str) -> Exception:
        return config_error("loss.name", where, problem)

    try:
        value = own(logits, targets)
        twice = own(torch.cat([logits, logits]), torch.cat([targets, targets]))
    except Exception as error:
        raise refuse(f"failed: {reason(error)}") from error
    if not isinstance(value, Tensor) or not value.is_floating_point() or list(value.shape) not in ([], [images]):
        raise refuse(f"returned {describe(value)}; return the mean over the images, or one number for each, [{images}]")
    if not value.isfinite().all():
        raise refuse("returned a value that is not finite")
    (gradient,) = torch.autograd.grad(value.mean(), logits, allow_unused=True) if value.requires_grad else (None,)
    if gradient is None or not gradient.isfinite().all() or not gradient.any():
        raise refuse("has no gradient, or one that is not finite, with respect to the logits")
    if not value.shape and images > 1 and torch.isclose(twice, 2 * value, rtol=1e-4) and value.abs() > 0:
        raise refuse("returned twice as much for every image given twice: a sum; return the mean over the images")
