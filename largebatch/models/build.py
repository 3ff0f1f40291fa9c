"""From the model's settings to the network, with the same weights on every rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

from largebatch.importing import import_object
from largebatch.models.check import check_structure
from largebatch.models.freeze import freeze
from largebatch.models.initialise import initialise
from largebatch.models.mlp import MLP
from largebatch.models.normalisation import keep_frozen
from largebatch.models.pretrained import load_weights
from largebatch.models.settings import SMALL_RESNET_BLOCKS, TORCHVISION_NAMES, ModelSettings
from largebatch.models.small_resnet import SmallResNet
from largebatch.wording import config_error, did_you_mean, reason, some

Shape = tuple[int, int, int]


def build(
    settings: ModelSettings, *, classes: int, shape: Shape, seed: int, note: Callable[[str], None] | None = None
) -> nn.Module:
    """The model on the CPU, for images of ``shape`` (channels, height, width) and that many ``classes``.

    The weights are a function of the arguments alone: they are drawn from torch's CPU generator under
    ``seed``, and its state is put back. A user's own function gets `model.arguments`, and the number of classes and
    the shape where its signature has a place for them. `note` is given lines that say how the weights start.
    Raises ConfigError, with the import path and the reason, where the function fails or gives no module, or one that
    cannot be trained the same on any number of ranks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _construct(settings, classes, shape)
        check_structure(model, settings.name)
        model = model.cpu()
        lines = _start(model, settings, classes)
    if note is not None:
        note("\n".join(lines))
    return model


def _start(model: nn.Module, settings: ModelSettings, classes: int) -> list[str]:
    """Initialise `model` as `settings` say; returns what was done, a line each."""
    if settings.starts_as == "paper":
        left = initialise(model, settings.last_gamma)
        lines = [f"weights             by the paper's initialisation (§5.1), last γ {settings.last_gamma:g}"]
        if left:
            lines.append(f"                    except frozen or parametrized layers: {some(left)}")
    else:
        lines = [f"weights             as the constructor of {settings.name} leaves them"]
    if settings.init_from == "timm":
        lines = [f"weights             as timm loads them for {settings.name}, the head for {classes} classes"]
    elif settings.init_from is not None:
        lines += load_weights(model, settings.init_from, name=settings.name, classes=classes)
    frozen = keep_frozen(model)
    if frozen:
        lines.append(f"frozen BatchNorm    {some(frozen)}")
    if settings.freeze:
        lines.append(f"frozen              {freeze(model, settings.freeze)} tensors that match {some(settings.freeze)}")
    return lines


def _construct(settings: ModelSettings, classes: int, shape: Shape) -> nn.Module:
    if settings.name == "mlp":
        return MLP(shape, settings.hidden, classes)
    if settings.name in SMALL_RESNET_BLOCKS:
        blocks = SMALL_RESNET_BLOCKS[settings.name]
        return SmallResNet(blocks, channels=shape[0], classes=classes, width=settings.width)
    if settings.name in TORCHVISION_NAMES:
        return _torchvision_model(settings, classes, shape)
    if settings.name.startswith("timm:"):
        return _timm_model(settings, classes, shape)
    return _own_model(settings, classes, shape)


def _timm_model(settings: ModelSettings, classes: int, shape: Shape) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise config_error("model.name", f"{settings.name!r} needs timm: pip install 'largebatch[timm]'") from None
    name = settings.name.removeprefix("timm:")
    if not timm.is_model(name):
        raise config_error("model.name", f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    offered = {"model_name": name, "pretrained": settings.init_from == "timm", "num_classes": classes}
    offered["in_chans"] = shape[0]
    configured = timm.get_pretrained_cfg(name)
    if configured is not None and configured.fixed_input_size:
        offered["img_size"] = shape[1:]
    return _call(settings, timm.create_model, {**offered, **settings.arguments})


def _torchvision_model(settings: ModelSettings, classes: int, shape: Shape) -> nn.Module:
    """torchvision's model itself; for images that are not RGB its first convolution takes their channels."""
    function = torchvision.models.get_model_builder(settings.name)
    offered: dict[str, Any] = {"num_classes": classes}
    if settings.name.startswith("vit_"):
        offered["image_size"] = shape[1]
    elif settings.name == "maxvit_t":
        offered["input_size"] = shape[1:]
    elif settings.name in ("googlenet", "inception_v3"):
        # Their second classifiers would make the output a tuple.
        offered |= (
            {"init_weights": True} if settings.arguments.get("weights") else {"aux_logits": False, "init_weights": True}
        )
    model = _call(settings, function, {**offered, **settings.arguments})
    _take_channels(model, shape[0])
    return model


def _take_channels(model: nn.Module, channels: int) -> None:
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if channels == first.in_channels:
        return
    replaced = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        stride=first.stride,  # type: ignore[arg-type]
        padding=first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(replaced.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(name, replaced)


def _own_model(settings: ModelSettings, classes: int, shape: Shape) -> nn.Module:
    function = import_object(settings.name, "model.name")
    if not callable(function) or isinstance(function, nn.Module):
        raise config_error("model.name", f"{settings.name!r} is not a function or class")
    model = _call(settings, function, {**_offered(function, classes, shape), **settings.arguments})
    if not isinstance(model, nn.Module):
        raise config_error("model.name", f"{settings.name!r} returned a {type(model).__name__}, not an nn.Module")
    return model


def _offered(function: Callable[..., Any], classes: int, shape: Shape) -> dict[str, Any]:
    """The number of classes and the shape under the names that `function` has for them."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a function written in C
        return {}
    offered = {"classes": classes, "num_classes": classes, "shape": shape}
    named = {key: value for key, value in offered.items() if key in parameters}
    if not {"classes", "num_classes"} & named.keys() and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        named["num_classes"] = classes  # torchvision's and timm's functions hand their **kwargs on
    return named


def _call(settings: ModelSettings, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        # A function may hand its **kwargs to one that knows no num_classes.
        unasked = arguments.keys() - settings.arguments.keys() & {"num_classes"}
        if (
            isinstance(error, TypeError)
            and unasked
            and settings.name not in TORCHVISION_NAMES
            and "num_classes" in str(error)
        ):
            return _call(settings, function, {k: v for k, v in arguments.items() if k != "num_classes"})
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise config_error(
            "model.name", f"{settings.name!r} failed when called with ({given})", reason(error)
        ) from error
