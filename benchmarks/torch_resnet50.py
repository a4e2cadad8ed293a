# SPDX-License-Identifier: Apache-2.0
"""ResNet-50 and ResNeXt-50 with experts in PyTorch.

Written from the description in `balpoe_jax.models.resnet_imagenet`. Parameters have the names that
`balpoe_jax.torch_import` reads, so that both sides can start from the same weights.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from benchmarks.torch_resnet import CosineHead

# Blocks in each stage of both networks.
STAGE_SIZES = (3, 4, 6, 3)
# Groups of the 3x3 convolutions, and channels of a group where a stage has width 64.
GROUPS = {"resnet50": (1, 64), "resnext50": (32, 4)}


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution; a 1x1 convolution as shortcut where the shape changes."""

    def __init__(self, in_width: int, width: int, stride: int, groups: tuple[int, int]) -> None:
        super().__init__()
        inner, outer = groups[0] * (groups[1] * width // 64), 4 * width
        self.conv1 = nn.Conv2d(in_width, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups[0], bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.downsample = None
        if stride != 1 or in_width != outer:
            shortcut = nn.Conv2d(in_width, outer, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float `[B, in, H, W]` -> `[B, 4 width, H / stride, W / stride]`."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return functional.relu(y + shortcut, inplace=True)


class Backbone(nn.Module):
    """Stem and two stages, then two stages and a head for each of several experts."""

    def __init__(
        self, sizes: Sequence[int], num_experts: int, num_classes: int, groups: tuple[int, int]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, sizes[0], 1, groups)
        self.layer2 = _stage(256, 128, sizes[1], 2, groups)
        experts = range(num_experts)
        self.layer3s = nn.ModuleList(_stage(512, 256, sizes[2], 2, groups) for _ in experts)
        self.layer4s = nn.ModuleList(_stage(1024, 512, sizes[3], 2, groups) for _ in experts)
        self.linears = nn.ModuleList(CosineHead(2048, num_classes) for _ in experts)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float `[B, 3, H, W]` -> logits `[E, B, C]`; heads compute in float32."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer2(self.layer1(functional.max_pool2d(x, 3, 2, 1)))
        experts = zip(self.layer3s, self.layer4s, strict=True)
        features = [layer4(layer3(x)).float().mean(dim=(2, 3)) for layer3, layer4 in experts]
        with torch.autocast(images.device.type, enabled=False):
            heads = zip(self.linears, features, strict=True)
            return torch.stack([head(x) for head, x in heads])


class Ensemble(nn.Module):
    """A backbone under the name that the reference's checkpoints have; two experts or more.

    Args:
        name: "resnet50" or "resnext50".
        num_experts: Number of experts, at least 2.
        num_classes: Number of classes.
        sizes: Blocks in each stage; None for the network's own.
    """

    def __init__(
        self, name: str, num_experts: int, num_classes: int, sizes: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.backbone = Backbone(sizes or STAGE_SIZES, num_experts, num_classes, GROUPS[name])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float `[B, 3, H, W]` -> logits `[E, B, C]`."""
        return self.backbone(images)


def _stage(
    in_width: int, width: int, blocks: int, stride: int, groups: tuple[int, int]
) -> nn.Sequential:
    first = Bottleneck(in_width, width, stride, groups)
    others = (Bottleneck(4 * width, width, 1, groups) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)
