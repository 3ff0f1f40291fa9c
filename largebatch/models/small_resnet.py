"""Residual networks for small images, of depth 6n + 2 (He et al., CVPR 2016, §4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PaddedShortcut(nn.Module):
    """The parameter-free shortcut (option A, He et al.'s on CIFAR): subsample, pad with zero channels."""

    def __init__(self, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        half = self.extra_channels // 2
        subsampled = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(subsampled, (0, 0, 0, 0, half, self.extra_channels - half))


class SmallBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm around an identity."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = PaddedShortcut(stride, channels - channels_in) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + shortcut)


class SmallResNet(nn.Module):
    """Three stages of ``blocks`` blocks, ``width``, twice and four times as many channels wide; takes any channels and
    image size.

    Images of shape (batch, channels, height, width) give logits of shape (batch, classes).
    """

    def __init__(self, blocks: int, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        first, second, third = width, 2 * width, 4 * width
        self.conv1 = nn.Conv2d(channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(blocks, first, first, stride=1)
        self.layer2 = _stage(blocks, first, second, stride=2)
        self.layer3 = _stage(blocks, second, third, stride=2)
        self.fc = nn.Linear(third, classes)

    def forward(self, images: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(images)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(torch.mean(out, dim=(2, 3)))


def _stage(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
    rest = [SmallBlock(channels, channels, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(SmallBlock(channels_in, channels, stride), *rest)
