# SPDX-License-Identifier: Apache-2.0
"""ResNets and ResNeXts for large images (He et al., CVPR 2016; Xie et al., CVPR 2017), cut into
trunk and expert.

The trunk is the stem and the first two stages unless more or less is shared; an expert has the
other stages. A stage of width `w` has `4 w` output channels. Widths are 64, 128, 256 and 512, or
64, 128, 192 and 384 if reduced. The stride of a block is that of its 3x3 convolution.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax.nn import initializers

from balpoe_jax.models.layers import BatchNorm, global_average, stages

STEM_WIDTH = 64
WIDTHS = (64, 128, 256, 512)
REDUCED_WIDTHS = (64, 128, 192, 384)
EXPANSION = 4

Conv = partial(
    nn.Conv,
    use_bias=False,
    # The reference scales by outgoing connections here, by incoming ones in its CIFAR networks.
    kernel_init=initializers.variance_scaling(2.0, "fan_out", "normal"),
)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with a shortcut around them.

    Where the shape changes, the shortcut is a strided 1x1 convolution with BatchNorm.

    Attributes:
        width: A quarter of the number of output channels.
        groups: Number of groups of the 3x3 convolution.
        group_width: Channels of a group where `width` is 64; the 3x3 convolution has
            `groups * group_width * width / 64` channels, `width` by default.
    """

    width: int
    stride: int = 1
    groups: int = 1
    group_width: int = 64
    axis_name: str | None = None
    dtype: Any = None
    norm: Any = BatchNorm
    convolve: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, in]` -> `[B, ceil(H / stride), ceil(W / stride), 4 width]`."""
        norm = partial(
            self.norm, use_running_average=not train, axis_name=self.axis_name, dtype=self.dtype
        )
        # Explicit padding, because "SAME" pads strided convolutions on the other side than PyTorch.
        conv = partial(Conv, dtype=self.dtype, conv_general_dilated=self.convolve)
        conv1x1 = partial(conv, kernel_size=(1, 1), padding=((0, 0), (0, 0)))
        conv3x3 = partial(conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)))
        strides = (self.stride, self.stride)
        inner = self.groups * (self.group_width * self.width // 64)
        outer = EXPANSION * self.width

        y = nn.relu(norm(name="bn1")(conv1x1(inner, name="conv1")(x)))
        y = conv3x3(inner, strides=strides, feature_group_count=self.groups, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y))
        y = norm(name="bn3")(conv1x1(outer, name="conv3")(y))
        if self.stride != 1 or x.shape[-1] != outer:
            x = norm(name="shortcut_bn")(conv1x1(outer, strides=strides, name="shortcut_conv")(x))
        return nn.relu(x + y)


class Trunk(nn.Module):
    """The stem and the first stages, shared by all experts.

    Attributes:
        num_blocks, widths: Number of blocks and width of each shared stage.
        block: Function of width, `stride` and `name` that makes a `Bottleneck`.
        stem: Whether the stem is shared; if not, the trunk returns the images.
        all_stages: Whether to return the outputs of all stages instead of the last one's.
    """

    num_blocks: Sequence[int]
    widths: Sequence[int]
    block: Callable[..., nn.Module] = Bottleneck
    stem: bool = True
    axis_name: str | None = None
    dtype: Any = None
    remat: bool = False
    norm: Any = BatchNorm
    all_stages: bool = False

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the output of each stage."""
        return tuple(EXPANSION * width for width in self.widths)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Any:
        """Float `[B, H, W, 3]` -> `[B, H / 8, W / 8, 512]`, rounded up, if two stages are shared.

        `train` says whether to use and update batch statistics.
        """
        x = _stem(self, images, train) if self.stem else images
        maps = stages(x, train, 1, self.num_blocks, self.widths, self.block, self.remat)
        return maps[1:] if self.all_stages else maps[-1]


class ExpertBody(nn.Module):
    """The other stages and global average pooling: trunk output -> `[B, D]`.

    The reference's ResNeXt ends in a 7x7 average pool instead. It takes only images of 224 pixels,
    for which that is the same.

    Attributes:
        num_blocks, widths: Number of blocks and width of each of the expert's stages.
        block: Function of width, `stride` and `name` that makes a `Bottleneck`.
        first_stage: Number of the first of these stages, counted from 1.
        stem: Whether the expert has its own stem, because the trunk returns images.
    """

    num_blocks: Sequence[int]
    widths: Sequence[int]
    block: Callable[..., nn.Module] = Bottleneck
    first_stage: int = 3
    stem: bool = False
    axis_name: str | None = None
    dtype: Any = None
    remat: bool = False
    norm: Any = BatchNorm
    convolve: Any = None

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the output of each stage."""
        return tuple(EXPANSION * width for width in self.widths)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, factor: jax.Array | None = None) -> jax.Array:
        """Float `[B, H, W, 512]` -> `[B, D]`; `train` uses and updates batch statistics.

        A factor `[B, h, w, D]` multiplies the map before it is pooled.
        """
        if self.stem:
            x = _stem(self, x, train, self.convolve)
        block = partial(self.block, convolve=self.convolve)
        x = stages(x, train, self.first_stage, self.num_blocks, self.widths, block, self.remat)[-1]
        return global_average(x if factor is None else x * factor)


def _stem(module: Any, images: jax.Array, train: bool, convolve: Any = None) -> jax.Array:
    """`[B, H, W, 3]` -> `[B, H / 4, W / 4, 64]`, by submodules of the trunk or body that calls."""
    conv = Conv(
        STEM_WIDTH,
        kernel_size=(7, 7),
        strides=(2, 2),
        padding=((3, 3), (3, 3)),
        dtype=module.dtype,
        conv_general_dilated=convolve,
        name="conv1",
    )
    norm = module.norm(
        use_running_average=not train,
        axis_name=module.axis_name,
        dtype=module.dtype,
        name="bn1",
    )
    x = nn.relu(norm(conv(images)))
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
