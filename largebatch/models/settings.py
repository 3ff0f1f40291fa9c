"""The config section of the model."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from largebatch.section import Section
from largebatch.wording import did_you_mean

TORCHVISION_NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
SMALL_RESNET_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet56": 9}
"""Blocks in each of the three stages: n of the depth 6n + 2."""
MLP_HIDDEN = [100, 100, 100, 100]

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def known_names() -> tuple[str, ...]:
    """The models that are called by a bare name."""
    return (*TORCHVISION_NAMES, *SMALL_RESNET_BLOCKS, "mlp")


class ModelSettings(Section):
    """Which network is trained, and how its weights start."""

    name: str = "resnet50"
    """A torchvision ResNet (resnet18 to resnet152, resnext…, wide_resnet…), resnet8, resnet20, resnet32 or
    resnet56 for small images, mlp, or your own function or class as `package.module:function`."""
    last_gamma: float = Field(0.0, ge=0, le=1)
    """Initial γ of the last BatchNorm of every residual block: 0 in the paper (§5.1), 1 in its ablation."""
    initialisation: Literal["paper", "own"] = "paper"
    """paper: §5.1's, applied by module type, to your own model too (so it overwrites weights that the model
    brings along); own: what the model's constructor leaves."""
    hidden: list[int] = Field(default=MLP_HIDDEN)
    """Widths of the hidden layers (mlp only)."""
    width: int = Field(16, ge=1)
    """Channels of the first of the three stages (resnet8 to resnet56 only; He et al.: 16)."""
    arguments: dict[str, Any] = Field(default={})
    """Keyword arguments for torchvision's or your own function."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if ":" in name:
            if not _IMPORT_PATH.fullmatch(name):
                raise ValueError(f"{name!r} is not of the form package.module:function")
        elif name not in known_names():
            hint = did_you_mean(name, known_names()) or f"; one of {', '.join(known_names())}"
            raise ValueError(f"{name!r} is not a known model{hint} (your own: package.module:function)")
        return name

    @field_validator("hidden")
    @classmethod
    def _positive(cls, hidden: list[int]) -> list[int]:
        if any(width < 1 for width in hidden):
            raise ValueError(f"{hidden}: every width must be at least 1")
        return hidden

    @model_validator(mode="after")
    def _no_idle_key(self) -> ModelSettings:
        if self.hidden != MLP_HIDDEN and self.name != "mlp":
            raise ValueError(f"hidden: {self.hidden} is for the mlp; {self.name} does not take it")
        if self.width != 16 and self.name not in SMALL_RESNET_BLOCKS:
            names = ", ".join(SMALL_RESNET_BLOCKS)
            raise ValueError(f"width: {self.width} is for {names}; {self.name} does not take it")
        if self.arguments and (self.name == "mlp" or self.name in SMALL_RESNET_BLOCKS):
            raise ValueError(f"arguments: {self.name} takes none; seen {', '.join(self.arguments)}")
        if "num_classes" in self.arguments and self.name in TORCHVISION_NAMES:
            raise ValueError("arguments: num_classes comes from the data set")
        if self.initialisation == "own" and self.last_gamma != 0:
            raise ValueError(f"last_gamma: {self.last_gamma:g} needs initialisation: paper")
        if self.initialisation == "paper" and self.arguments.get("weights") is not None:
            raise ValueError("arguments: weights would be overwritten; set initialisation: own")
        return self
