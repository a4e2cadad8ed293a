# SPDX-License-Identifier: Apache-2.0
"""ResNets for small images (He et al., CVPR 2016, Section 4.2), cut into trunk and expert.

The trunk is the stem and the first stage; an expert has the other two stages of its own. Widths
are 16, 32, 64, or 16, 24, 48 reduced. Stage `s` of ResNet-(6n+2) has n basic blocks.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from balpoe_jax.models.layers import BatchNorm, Stage, global_average

TRUNK_WIDTH = 16

Conv3x3 = partial(
    nn.Conv,
    kernel_size=(3, 3),
    # Explicit: "SAME" pads a strided convolution on the other side than PyTorch does.
    padding=((1, 1), (1, 1)),
    use_bias=False,
    kernel_init=initializers.variance_scaling(2.0, "fan_in", "normal"),
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut ("option A").

    Where the shape changes, the shortcut takes every second pixel and pads the new channels with
    zeros, half of them on each side.
    """

    width: int
    stride: int = 1
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, in]` -> `[B, H / stride, W / stride, width]`."""
        norm = partial(
            BatchNorm, use_running_average=not train, axis_name=self.axis_name, dtype=self.dtype
        )
        conv = partial(Conv3x3, self.width, dtype=self.dtype)
        y = conv(strides=(self.stride, self.stride), name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(name="conv2")(y)
        y = norm(name="bn2")(y)
        if self.stride != 1 or x.shape[-1] != self.width:
            x = x[:, :: self.stride, :: self.stride]
            added = self.width - x.shape[-1]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (added // 2, added - added // 2)))
        return nn.relu(x + y)


class Trunk(nn.Module):
    """Stem and first stage, shared by all experts: `[B, H, W, 3]` -> `[B, H, W, 16]`."""

    num_blocks: int
    axis_name: str | None = None
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, 3]` -> `[B, H, W, 16]`; `train` uses and updates batch statistics."""
        x = Conv3x3(TRUNK_WIDTH, dtype=self.dtype, name="conv1")(images)
        norm = BatchNorm(
            use_running_average=not train, axis_name=self.axis_name, dtype=self.dtype, name="bn1"
        )
        x = nn.relu(norm(x))
        block = partial(BasicBlock, TRUNK_WIDTH, axis_name=self.axis_name, dtype=self.dtype)
        return Stage(block, self.num_blocks, 1, self.remat, name="layer1")(x, train)


class ExpertBody(nn.Module):
    """Second and third stage and global average pooling: trunk output -> `[B, D]`."""

    num_blocks: Sequence[int]
    widths: Sequence[int]
    axis_name: str | None = None
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, 16]` -> `[B, D]`; `train` uses and updates batch statistics."""
        for i, (blocks, width) in enumerate(zip(self.num_blocks, self.widths, strict=True)):
            block = partial(BasicBlock, width, axis_name=self.axis_name, dtype=self.dtype)
            x = Stage(block, blocks, 2, self.remat, name=f"layer{i + 2}")(x, train)
        return global_average(x)
