# SPDX-License-Identifier: Apache-2.0
"""ResNets for small images (He et al., CVPR 2016, Section 4.2), cut into trunk and expert.

The trunk is the stem and the first stage unless more or less is shared; an expert has the other
stages. Widths are 16, 32 and 64, or 16, 24 and 48 if reduced, or a multiple of these. Each stage of
ResNet-(6n+2) has n basic blocks.

The variant of BBN (Zhou et al., CVPR 2020), which LADE's figures are for, ends in two parallel
blocks in place of the last one, so that it has twice as many features.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from balpoe_jax.models.layers import BatchNorm, Stage, global_average, stages

STEM_WIDTH = 16
WIDTHS = (16, 32, 64)
REDUCED_WIDTHS = (16, 24, 48)

Conv3x3 = partial(
    nn.Conv,
    kernel_size=(3, 3),
    # Explicit, because "SAME" pads a strided convolution on the other side than PyTorch.
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
    norm: Any = BatchNorm
    convolve: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, in]` -> `[B, H / stride, W / stride, width]`."""
        norm = partial(
            self.norm, use_running_average=not train, axis_name=self.axis_name, dtype=self.dtype
        )
        conv = partial(Conv3x3, self.width, dtype=self.dtype, conv_general_dilated=self.convolve)
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
    """The stem and the first stages, shared by all experts.

    Attributes:
        num_blocks, widths: Number of blocks and width of each shared stage.
        stem: Whether the stem is shared; if not, the trunk returns the images.
        stem_width: Width of the stem.
        all_stages: Whether to return the outputs of all stages instead of the last one's.
    """

    num_blocks: Sequence[int]
    widths: Sequence[int]
    stem: bool = True
    axis_name: str | None = None
    dtype: Any = None
    remat: bool = False
    norm: Any = BatchNorm
    all_stages: bool = False
    stem_width: int = STEM_WIDTH

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the output of each stage."""
        return tuple(self.widths)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Any:
        """Float `[B, H, W, 3]` -> `[B, H, W, 16]`, if the first stage is the last one shared.

        `train` says whether to use and update batch statistics.
        """
        x = _stem(self, images, train) if self.stem else images
        block = partial(BasicBlock, axis_name=self.axis_name, dtype=self.dtype, norm=self.norm)
        maps = stages(x, train, 1, self.num_blocks, self.widths, block, self.remat)
        return maps[1:] if self.all_stages else maps[-1]


class ExpertBody(nn.Module):
    """The other stages and global average pooling: trunk output -> `[B, D]`.

    Attributes:
        num_blocks, widths: Number of blocks and width of each of the expert's stages.
        first_stage: Number of the first of these stages, counted from 1.
        stem: Whether the expert has its own stem, because the trunk returns images.
        last_width: Width of each of the two parallel blocks of BBN's variant; 0 for none.
        stem_width: Width of its own stem.
    """

    num_blocks: Sequence[int]
    widths: Sequence[int]
    first_stage: int = 2
    stem: bool = False
    last_width: int = 0
    axis_name: str | None = None
    dtype: Any = None
    remat: bool = False
    norm: Any = BatchNorm
    convolve: Any = None
    stem_width: int = STEM_WIDTH

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the output of each stage."""
        ending = (2 * self.last_width,) if self.last_width else ()
        return (*self.widths[: len(self.widths) - len(ending)], *ending)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, factor: jax.Array | None = None) -> jax.Array:
        """Float `[B, H, W, 16]` -> `[B, D]`; `train` uses and updates batch statistics.

        A factor `[B, h, w, D]` multiplies the map before it is pooled.
        """
        if self.stem:
            x = _stem(self, x, train, self.convolve)
        block = partial(
            BasicBlock,
            axis_name=self.axis_name,
            dtype=self.dtype,
            norm=self.norm,
            convolve=self.convolve,
        )
        x = stages(x, train, self.first_stage, self.num_blocks, self.widths, block, self.remat)[-1]
        if self.last_width:
            last = partial(Stage, partial(block, self.last_width), 1, 1, self.remat)
            x = jnp.concatenate([last(name=f"branch{i}")(x, train) for i in (1, 2)], axis=-1)
        return global_average(x if factor is None else x * factor)


def _stem(module: Any, images: jax.Array, train: bool, convolve: Any = None) -> jax.Array:
    """`[B, H, W, 3]` -> `[B, H, W, stem]`, by submodules of the trunk or body that calls."""
    conv = partial(Conv3x3, dtype=module.dtype, conv_general_dilated=convolve, name="conv1")
    x = conv(module.stem_width)(images)
    norm = module.norm(
        use_running_average=not train,
        axis_name=module.axis_name,
        dtype=module.dtype,
        name="bn1",
    )
    return nn.relu(norm(x))
