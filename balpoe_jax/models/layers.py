# SPDX-License-Identifier: Apache-2.0
"""Parts that the backbones share: batch normalisation, stages of blocks, and pooling."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

# PyTorch's momentum of 0.1 is 0.9 here; Flax's own default is 0.99.
BATCH_NORM_MOMENTUM = 0.9
BatchNorm = partial(nn.BatchNorm, momentum=BATCH_NORM_MOMENTUM, epsilon=1e-5)


class Stage(nn.Module):
    """Blocks of one kind in a row, the first with the stride.

    Attributes:
        block: Function of `stride` and `name` that makes a block.
        num_blocks: Number of blocks, at least 1.
        stride: Stride of the first block.
        remat: Whether only the blocks' inputs are stored for the backward pass, which computes the
            rest again: less memory for about a third more work, and equal gradients.
    """

    block: Callable[..., nn.Module]
    num_blocks: int
    stride: int
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, in]` -> `[B, ceil(H / stride), ceil(W / stride), out]`."""

        def apply(block: nn.Module, x: jax.Array) -> jax.Array:
            return block(x, train)

        if self.remat:
            apply = nn.remat(apply)
        for i in range(self.num_blocks):
            x = apply(self.block(stride=self.stride if i == 0 else 1, name=f"block{i}"), x)
        return x


def stages(
    x: jax.Array,
    train: bool,
    first: int,
    num_blocks: Sequence[int],
    widths: Sequence[int],
    block: Callable[..., nn.Module],
    remat: bool,
) -> tuple[jax.Array, ...]:
    """Applies stages in a row, as submodules `layer1`, ... of the module that calls this.

    All stages but `layer1` have stride 2.

    Args:
        x: Input, float `[B, H, W, in]`.
        train: Whether to use and update batch statistics.
        first: Number of the first of these stages, counted from 1.
        num_blocks, widths: Number of blocks and width of each stage.
        block: Function of width, `stride` and `name` that makes a block.
        remat: Whether blocks are computed again in the backward pass, see `Stage`.

    Returns:
        `x`, and then the output of each stage.
    """
    maps = [x]
    for number, (blocks, width) in enumerate(zip(num_blocks, widths, strict=True), first):
        stride = 1 if number == 1 else 2
        stage = Stage(partial(block, width), blocks, stride, remat, name=f"layer{number}")
        maps.append(stage(maps[-1], train))
    return tuple(maps)


def global_average(x: jax.Array) -> jax.Array:
    """Float `[B, H, W, D]` -> `[B, D]`, computed and returned in float32 or wider."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
