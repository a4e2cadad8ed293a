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

TRUNK_WIDTH = 16

Conv3x3 = partial(
    nn.Conv,
    kernel_size=(3, 3),
    # Explicit: "SAME" pads a strided convolution on the other side than PyTorch does.
    padding=((1, 1), (1, 1)),
    use_bias=False,
    kernel_init=initializers.variance_scaling(2.0, "fan_in", "normal"),
)

# PyTorch's momentum of 0.1 is 0.9 here; Flax's own default is 0.99.
BatchNorm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


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


class Stage(nn.Module):
    """`num_blocks` basic blocks, the first with the stride."""

    width: int
    num_blocks: int
    stride: int
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, in]` -> `[B, H / stride, W / stride, width]`."""
        for i in range(self.num_blocks):
            stride = self.stride if i == 0 else 1
            x = BasicBlock(self.width, stride, self.axis_name, self.dtype, name=f"block{i}")(
                x, train
            )
        return x


class Trunk(nn.Module):
    """Stem and first stage, shared by all experts: `[B, H, W, 3]` -> `[B, H, W, 16]`."""

    num_blocks: int
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, 3]` -> `[B, H, W, 16]`; `train` uses and updates batch statistics."""
        x = Conv3x3(TRUNK_WIDTH, dtype=self.dtype, name="conv1")(images)
        norm = BatchNorm(
            use_running_average=not train, axis_name=self.axis_name, dtype=self.dtype, name="bn1"
        )
        x = nn.relu(norm(x))
        return Stage(TRUNK_WIDTH, self.num_blocks, 1, self.axis_name, self.dtype, name="layer1")(
            x, train
        )


class ExpertBody(nn.Module):
    """Second and third stage and global average pooling: trunk output -> `[B, D]`."""

    num_blocks: Sequence[int]
    widths: Sequence[int]
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, 16]` -> `[B, D]`; `train` uses and updates batch statistics."""
        for i, (blocks, width) in enumerate(zip(self.num_blocks, self.widths, strict=True)):
            x = Stage(width, blocks, 2, self.axis_name, self.dtype, name=f"layer{i + 2}")(x, train)
        return jnp.mean(x, axis=(1, 2))
