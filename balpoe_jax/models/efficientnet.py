# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0, a small network for large images, cut into trunk and expert.

It is EfficientNet-B0 (Tan and Le, ICML 2019, Table 1) without squeeze-and-excitation and with ReLU6
in place of swish, as its authors published it for mobile devices in 2020. Stage 8 is the last 1x1
convolution. The trunk is the stem and the first five stages unless more or less is shared; an
expert has the other stages. Images are padded as "SAME" pads them, on the right and at the bottom.

Published weights are for images of 224 pixels that were normalised by `(x - 127) / 128`. In
training its authors drop blocks at random, which is not done here.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.nn import initializers

from balpoe_jax.models.layers import global_average

STEM_WIDTH = 32
# Channels of each stage's output; the last stage is a 1x1 convolution.
WIDTHS = (16, 24, 40, 80, 112, 192, 320, 1280)
# Names of a block's BatchNorms in their order.
NORMS = ("expand_bn", "depthwise_bn", "project_bn")
# By which the images of the published weights were normalised.
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.99

Conv = partial(
    nn.Conv, use_bias=False, kernel_init=initializers.variance_scaling(2.0, "fan_out", "normal")
)


class _Shape(NamedTuple):
    """Of a stage's blocks: size of the kernel, stride of the first, and factor of the channels."""

    kernel: int
    stride: int
    expansion: int


_SHAPES = (
    _Shape(3, 1, 1),
    _Shape(3, 2, 6),
    _Shape(5, 2, 6),
    _Shape(3, 2, 6),
    _Shape(5, 1, 6),
    _Shape(5, 2, 6),
    _Shape(3, 1, 6),
)


class InvertedResidual(nn.Module):
    """A 1x1 convolution to more channels, one in each channel, and a 1x1 convolution to fewer.

    The input is added where the shape does not change (Sandler et al., CVPR 2018).

    Attributes:
        width: Number of output channels.
        kernel: Size of the kernel of the convolution in each channel.
        stride: Its stride.
        expansion: Factor of the channels between; 1 leaves the first convolution out.
    """

    width: int
    kernel: int
    stride: int
    expansion: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Float `[B, H, W, in]` -> `[B, ceil(H / stride), ceil(W / stride), width]`."""
        y, inner = x, self.expansion * x.shape[-1]
        if self.expansion != 1:
            y = self.conv(inner, (1, 1), name="expand_conv")(y)
            y = nn.relu6(self.norm(name="expand_bn")(y))
        size, strides = (self.kernel, self.kernel), (self.stride, self.stride)
        y = self.conv(
            inner, size, strides=strides, feature_group_count=inner, name="depthwise_conv"
        )(y)
        y = nn.relu6(self.norm(name="depthwise_bn")(y))
        y = self.norm(name="project_bn")(self.conv(self.width, (1, 1), name="project_conv")(y))
        return x + y if x.shape == y.shape else y


class Part(nn.Module):
    """The stages of a trunk or of a body.

    Attributes:
        num_blocks: Number of blocks of each stage.
        widths: Width of each stage.
        first_stage: Number of the first of these stages, counted from 1.
        stem: Whether the stem stands before them.
        convolve: Function that computes the convolutions; None for Flax's.
    """

    num_blocks: Sequence[int]
    widths: Sequence[int]
    first_stage: int = 1
    stem: bool = False
    axis_name: str | None = None
    dtype: Any = None
    remat: bool = False
    norm: Any = None
    convolve: Any = None

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the output of each stage."""
        return tuple(self.widths)

    def maps(self, x: jax.Array, train: bool) -> list[jax.Array]:
        """The input after the stem, and the output of each stage."""
        conv = partial(Conv, dtype=self.dtype, conv_general_dilated=self.convolve)
        norm = partial(
            self.norm,
            use_running_average=not train,
            axis_name=self.axis_name,
            dtype=self.dtype,
            epsilon=BATCH_NORM_EPSILON,
            momentum=BATCH_NORM_MOMENTUM,
        )
        if self.stem:
            x = conv(STEM_WIDTH, (3, 3), strides=(2, 2), name="stem_conv")(x)
            x = nn.relu6(norm(name="stem_bn")(x))
        found = [x]
        block = nn.remat(InvertedResidual) if self.remat else InvertedResidual
        for stage, (blocks, width) in enumerate(
            zip(self.num_blocks, self.widths, strict=True), self.first_stage
        ):
            if stage == len(WIDTHS):
                x = nn.relu6(norm(name="last_bn")(conv(width, (1, 1), name="last_conv")(x)))
            for i in range(blocks if stage < len(WIDTHS) else 0):
                shape = _SHAPES[stage - 1]
                x = block(
                    width,
                    shape.kernel,
                    shape.stride if i == 0 else 1,
                    shape.expansion,
                    conv,
                    norm,
                    name=f"layer{stage}_block{i}",
                )(x)
            found.append(x)
        return found


class Trunk(Part):
    """The stem and the first stages, shared by all experts.

    Attributes:
        all_stages: Whether to return the outputs of all stages instead of the last one's.
    """

    all_stages: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Any:
        """Float `[B, H, W, 3]` -> `[B, H / 16, W / 16, 112]`, rounded up, if five are shared.

        `train` says whether to use and update batch statistics.
        """
        found = self.maps(images, train)
        return found[1:] if self.all_stages else found[-1]


class ExpertBody(Part):
    """The other stages and global average pooling: trunk output -> `[B, 1280]`."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, factor: jax.Array | None = None) -> jax.Array:
        """Float `[B, H, W, in]` -> `[B, D]`; `train` uses and updates batch statistics.

        A factor `[B, h, w, D]` multiplies the body's map before it is pooled.
        """
        x = self.maps(x, train)[-1]
        return global_average(x if factor is None else x * factor)
