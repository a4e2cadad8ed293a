# SPDX-License-Identifier: Apache-2.0
"""The CIFAR ResNet with experts and its training step in PyTorch: the other side of `train_step`.

Written from the description in `balpoe_jax.models.resnet_cifar`. Parameters have the names that
`balpoe_jax.torch_import` reads, so that both sides can start from the same weights.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from balpoe_jax.data.types import TrainBatch

Batch = dict[str, torch.Tensor]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.added = width - in_width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float `[B, in, H, W]` -> `[B, width, H / stride, W / stride]`."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.added:
            x = x[:, :, :: self.stride, :: self.stride]
            before = self.added // 2
            x = functional.pad(x, (0, 0, 0, 0, before, self.added - before))
        return functional.relu(x + y)


class CosineHead(nn.Module):
    """30 times the cosine between features and each class's weight."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        weight = torch.empty(features, num_classes).uniform_(-1, 1)
        self.weight = nn.Parameter(functional.normalize(weight, dim=0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float `[B, features]` -> `[B, C]`."""
        return 30 * functional.normalize(x, dim=1) @ functional.normalize(self.weight, dim=0)


class Backbone(nn.Module):
    """Stem and first stage, then two stages and a head for each of several experts."""

    def __init__(self, blocks: int, num_experts: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        experts = range(num_experts)
        self.layer2s = nn.ModuleList(_stage(16, 32, blocks, 2) for _ in experts)
        self.layer3s = nn.ModuleList(_stage(32, 64, blocks, 2) for _ in experts)
        self.linears = nn.ModuleList(CosineHead(64, num_classes) for _ in experts)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float `[B, 3, H, W]` -> logits `[E, B, C]`."""
        shared = self.layer1(functional.relu(self.bn1(self.conv1(images))))
        experts = zip(self.layer2s, self.layer3s, self.linears, strict=True)
        return torch.stack(
            [head(layer3(layer2(shared)).mean(dim=(2, 3))) for layer2, layer3, head in experts]
        )


class Ensemble(nn.Module):
    """A backbone under the name that the reference's checkpoints have; two experts or more."""

    def __init__(self, blocks: int, num_experts: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = Backbone(blocks, num_experts, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float `[B, 3, H, W]` -> logits `[E, B, C]`."""
        return self.backbone(images)


class Trainer:
    """A model, its optimizer and the BalPoE loss with mixed labels."""

    def __init__(
        self,
        model: Ensemble,
        log_prior: npt.NDArray[np.float32],
        taus: tuple[float, ...],
        learning_rate: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.model = model.train()
        self._bias = torch.tensor(taus)[:, None, None] * torch.from_numpy(log_prior)
        self._optimizer = torch.optim.SGD(
            model.parameters(), learning_rate, momentum, weight_decay=weight_decay, nesterov=True
        )

    def step(self, batch: Batch) -> float:
        """One update on `images` `[B, 3, H, W]`, `labels`, `other_labels`, `weight` `[B]`."""
        self._optimizer.zero_grad()
        loss = self._loss(self.model(batch["images"]), batch)
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def _loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        log_probabilities = functional.log_softmax(logits + self._bias, dim=-1)

        def picked(labels: torch.Tensor) -> torch.Tensor:
            index = labels.expand(len(logits), -1)[..., None]
            return log_probabilities.gather(-1, index)[..., 0]

        weight = batch["weight"]
        mixed = weight * picked(batch["labels"]) + (1 - weight) * picked(batch["other_labels"])
        return -mixed.mean()


def to_torch(batch: TrainBatch) -> Batch:
    """A batch of our pipeline's layout."""
    return {
        "images": torch.from_numpy(batch.images.transpose(0, 3, 1, 2).copy()),
        "labels": torch.from_numpy(batch.labels.astype(np.int64)),
        "other_labels": torch.from_numpy(batch.other_labels.astype(np.int64)),
        "weight": torch.from_numpy(batch.mix_weight),
    }


def _stage(in_width: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_width, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))
