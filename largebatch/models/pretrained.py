"""`model.init_from`: the weights of a file, a run or torchvision, put into a model; every tensor is accounted for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from largebatch.errors import ConfigError
from largebatch.wording import config_error, did_you_mean, reason, some

_KEY = "model.init_from"
_INSIDE = ("model", "state_dict", "model_state_dict")


def load_weights(model: nn.Module, source: str, *, name: str, classes: int) -> list[str]:
    """Put the weights of `source` into `model`; returns a line for each kind of thing that was done.

    A head for another number of classes keeps its start, and so does one that the source lacks. Position embeddings and
    the first convolution are resized to these images. Tensors that the model does not have are left out. Raises
    ConfigError, which lists names, if the source lacks any other tensor or has it in another shape.
    """
    own = model.state_dict()
    theirs = {_plain(key, own): tensor for key, tensor in _read(source, name).items()}
    head, first = _head(model, classes), _first_convolution(model)
    loaded: list[str] = []
    resized: list[str] = []
    replaced: list[str] = []
    wrong: list[str] = []
    for key, tensor in own.items():
        given = theirs.get(key)
        fitted = given if given is None or given.shape == tensor.shape else _resized(key, given, tensor, first)
        if fitted is not None:
            if not fitted.isfinite().all():
                raise config_error(_KEY, source, f"{key!r} has values that are not finite")
            tensor.copy_(fitted)
            (loaded if fitted is given else resized).append(key)
        elif key in head:
            replaced.append(key)
        elif not key.endswith("num_batches_tracked"):  # files of old do not have it
            wrong.append(f"{key} {_shape(given)} there, {_shape(tensor)} here")
    if wrong:
        raise config_error(_KEY, source, f"does not fit {name}: {some(wrong)}; give weights of this exact model")
    left_out = [key for key in theirs if key not in own and key != "n_averaged"]
    lines = [f"weights             {len(loaded)} tensors loaded from {source}"]
    for what, names in [("resized", resized), ("replaced: the head", replaced), ("left out", left_out)]:
        lines += [f"                    {what}: {some(names)}"] if names else []
    return lines


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))


def _plain(key: str, own: Mapping[str, Tensor]) -> str:
    """The name without what DDP, torch.compile and weight averaging put before it."""
    key = key.replace("_orig_mod.", "")
    while key not in own and key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _head(model: nn.Module, classes: int) -> set[str]:
    """The names of the last layer's tensors, if it gives one number for each class."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    of_classes = [name for name, module in layers if module.weight.shape[0] == classes]
    return (
        {f"{of_classes[-1]}.{part}" if of_classes[-1] else part for part in ("weight", "bias")} if of_classes else set()
    )


def _first_convolution(model: nn.Module) -> str:
    return next((f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)), "")


def _resized(key: str, given: Tensor, wanted: Tensor, first: str) -> Tensor | None:
    if key == first and given.ndim == 4 and given.shape[::2] == wanted.shape[::2] and given.shape[3] == wanted.shape[3]:
        # Gray images repeated three times would give the same sums.
        return given.sum(1, keepdim=True).expand_as(wanted) / wanted.shape[1]
    if key.endswith(("pos_embedding", "pos_embed")) and given.ndim == wanted.ndim == 3:
        return _resized_positions(given, wanted)
    return None


def _resized_positions(given: Tensor, wanted: Tensor) -> Tensor | None:
    """Embeddings of a square grid, maybe after those of other tokens, interpolated to another grid."""
    for others in (0, 1, 2, 5):
        old, new = (math.isqrt(max(t.shape[1] - others, 0)) for t in (given, wanted))
        if (old**2, new**2) != (given.shape[1] - others, wanted.shape[1] - others) or not old * new:
            continue
        if given.shape[2] != wanted.shape[2]:
            return None
        grid = given[:, others:].float().transpose(1, 2).unflatten(2, (old, old))
        grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
        return torch.cat([given[:, :others].float(), grid.flatten(2).transpose(1, 2)], dim=1)
    return None


def _read(source: str, name: str) -> dict[str, Tensor]:
    """The tensors of `source` by name. Raises ConfigError."""
    try:
        if source.startswith("torchvision:"):
            content = _of_torchvision(source, name)
        else:
            content = _of_file(_file(Path(source).expanduser()))
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:  # no network, a damaged file: whatever its bytes happen to mean
        raise config_error(_KEY, source, f"cannot be read: {reason(error)}") from error
    inside = [content[key] for key in _INSIDE if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
    tensors = inside[0] if inside else content
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise config_error(_KEY, source, "holds no state_dict (names and tensors)")
    return dict(tensors)


def _of_torchvision(source: str, name: str) -> Any:
    members = torchvision.models.get_model_weights(name).__members__
    wanted = source.removeprefix("torchvision:")
    if wanted not in members:
        raise config_error(
            _KEY, source, f"{name} has no such weights{did_you_mean(wanted, members)}; {some([*members])}"
        )
    return members[wanted].get_state_dict(progress=False, check_hash=True)


def _file(path: Path) -> Path:
    """The file itself, or a run folder's model.pt or newest intact checkpoint."""
    if not path.exists():
        raise config_error(_KEY, f"{path} does not exist; give a weights file or a run folder")
    if not path.is_dir():
        return path
    if (path / "model.pt").exists():
        return path / "model.pt"
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    whole = [file for file in sorted(folder.glob("step_*.pt")) if file.with_suffix(".json").exists()]
    if not whole:
        raise config_error(_KEY, f"{path} holds neither model.pt nor an intact checkpoint")
    return whole[-1]


def _of_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise config_error(_KEY, f"{path} needs safetensors; install it: pip install safetensors") from None
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
