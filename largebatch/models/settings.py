"""The config section of the model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from largebatch.importing import check_import_path
from largebatch.section import Section
from largebatch.wording import did_you_mean

TORCHVISION_RESNETS = (
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
_OTHERS_OF_TORCHVISION = """
alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf
regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf
regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf shufflenet_v2_x0_5 shufflenet_v2_x1_0
shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t
vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32
"""
# Spelled out, since the settings are read without torch; a test compares them with torchvision's own list.
TORCHVISION_NAMES = (*TORCHVISION_RESNETS, *_OTHERS_OF_TORCHVISION.split())
SMALL_RESNET_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet56": 9}
"""Blocks in each of the three stages: n of the depth 6n + 2."""
MLP_HIDDEN = [100, 100, 100, 100]


def known_names() -> tuple[str, ...]:
    """The models that are called by a bare name."""
    return (*TORCHVISION_NAMES, *SMALL_RESNET_BLOCKS, "mlp")


class ModelSettings(Section):
    """Which network is trained, and how its weights start."""

    name: str = "resnet50"
    """A classification model of torchvision (resnet50, vit_b_16, convnext_tiny …), resnet8, resnet20, resnet32 or
    resnet56 for small images, mlp, `timm:NAME` (with the extra largebatch[timm]), or your own function or class as
    `package.module:function`."""
    last_gamma: float = Field(0.0, ge=0, le=1)
    """Initial γ of the last BatchNorm of every residual block: 0 in the paper (§5.1), 1 in its ablation."""
    initialisation: Literal["auto", "paper", "own"] = "auto"
    """paper: §5.1's, applied by module type, to your own model too (overwriting weights that the model
    comes with); own: as the model's constructor sets them; auto: paper for ResNets and the mlp, own for the rest."""
    init_from: str | None = Field(None, min_length=1)
    """Weights to start from: a file (state_dict, safetensors, checkpoint), a run folder, torchvision:WEIGHTS
    (such as torchvision:DEFAULT), or timm for a timm model. A head for other classes is replaced."""
    freeze: list[str] = Field(default=[])
    """Names of parameters and modules that are not trained, such as `layer1` or `*.bn?.weight`; BatchNorm of a frozen
    part stays in evaluation mode."""
    hidden: list[int] = Field(default=MLP_HIDDEN)
    """Widths of the hidden layers (mlp only)."""
    width: int = Field(16, ge=1)
    """Channels of the first of the three stages (resnet8 to resnet56 only; He et al.: 16)."""
    arguments: dict[str, Any] = Field(default={})
    """Keyword arguments for torchvision's or your own function."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name.startswith("timm:"):
            if not name.removeprefix("timm:"):
                raise ValueError(f"{name!r} lacks a model name; write timm:resnet18, for example")
        elif ":" in name:
            check_import_path(name)
        elif name not in known_names():
            ours = ", ".join([*SMALL_RESNET_BLOCKS, "mlp"])
            hint = did_you_mean(name, known_names()) or f"; one of {ours}, or a classification model of torchvision"
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
        if self.init_from == "timm" and not self.name.startswith("timm:"):
            raise ValueError(f"init_from: timm is for timm models, and {self.name} is none; write name: timm:NAME")
        if (self.init_from or "").startswith("torchvision:") and self.name not in TORCHVISION_NAMES:
            raise ValueError(f"init_from: {self.init_from} is for torchvision models, and {self.name} is none")
        if self.init_from is not None and self.arguments.get("weights") is not None:
            raise ValueError("arguments: weights and init_from both give initial weights; keep one")
        if "num_classes" in self.arguments and (self.name in TORCHVISION_NAMES or self.name.startswith("timm:")):
            raise ValueError("arguments: num_classes comes from the data set")
        if self.starts_as == "own" and self.last_gamma != 0:
            raise ValueError(f"last_gamma: {self.last_gamma:g} needs initialisation: paper")
        if self.initialisation == "paper" and self.arguments.get("weights") is not None:
            raise ValueError("arguments: weights would be overwritten; set initialisation: own")
        return self

    @property
    def starts_as(self) -> Literal["paper", "own"]:
        """What `initialisation` means here: weights that a model may come with are never overwritten unasked."""
        if self.initialisation != "auto":
            return self.initialisation
        from_scratch = (*TORCHVISION_RESNETS, *SMALL_RESNET_BLOCKS, "mlp")
        return "paper" if self.name in from_scratch and self.arguments.get("weights") is None else "own"
