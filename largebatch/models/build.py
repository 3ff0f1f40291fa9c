"""From the model's settings to the network, with the same weights on every rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn.parameter import is_lazy

from largebatch.importing import import_object
from largebatch.models.initialise import initialise
from largebatch.models.mlp import MLP
from largebatch.models.settings import SMALL_RESNET_BLOCKS, TORCHVISION_NAMES, ModelSettings
from largebatch.models.small_resnet import SmallResNet
from largebatch.wording import config_error, reason

Shape = tuple[int, int, int]


def build(settings: ModelSettings, *, classes: int, shape: Shape, seed: int) -> nn.Module:
    """The model on the CPU, for images of ``shape`` (channels, height, width) and that many ``classes``.

    The weights are a function of the arguments alone: they are drawn from torch's CPU generator under
    ``seed``, and its state is put back. A user's own function gets `model.arguments`, and `classes` and
    `shape` where its signature names them. Raises ConfigError, with the import path and the reason, where the
    function fails or gives no module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _construct(settings, classes, shape)
        if settings.initialisation == "paper":
            initialise(model, settings.last_gamma)
    return model


def _construct(settings: ModelSettings, classes: int, shape: Shape) -> nn.Module:
    if settings.name == "mlp":
        return MLP(shape, settings.hidden, classes)
    if settings.name in SMALL_RESNET_BLOCKS:
        blocks = SMALL_RESNET_BLOCKS[settings.name]
        return SmallResNet(blocks, channels=shape[0], classes=classes, width=settings.width)
    if settings.name in TORCHVISION_NAMES:
        return _torchvision_resnet(settings, classes, channels=shape[0])
    return _own_model(settings, classes, shape)


def _torchvision_resnet(settings: ModelSettings, classes: int, channels: int) -> nn.Module:
    """torchvision's model itself; for images that are not RGB its first convolution takes their channels."""
    function = torchvision.models.get_model_builder(settings.name)
    model = _call(settings, function, {"num_classes": classes, **settings.arguments})
    if channels != model.conv1.in_channels:
        model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def _own_model(settings: ModelSettings, classes: int, shape: Shape) -> nn.Module:
    function = import_object(settings.name, "model.name")
    if not callable(function) or isinstance(function, nn.Module):
        raise config_error("model.name", f"{settings.name!r} is no function or class")
    named = _parameter_names(function)
    offered = {key: value for key, value in [("classes", classes), ("shape", shape)] if key in named}
    model = _call(settings, function, {**offered, **settings.arguments})
    if not isinstance(model, nn.Module):
        raise config_error("model.name", f"{settings.name!r} returned a {type(model).__name__}, no nn.Module")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise config_error("model.name", f"{settings.name!r} has lazy layers; give them their sizes")
    return model


def _parameter_names(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except ValueError:  # a function written in C
        return set()


def _call(settings: ModelSettings, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise config_error(
            "model.name", f"{settings.name!r} failed when called with ({given})", reason(error)
        ) from error
