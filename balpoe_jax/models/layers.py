# SPDX-License-Identifier: Apache-2.0
"""What the backbones share: batch normalisation, stages of blocks, and pooling."""

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
        block: makes a block of its keyword arguments `stride` and `name`.
        num_blocks: at least 1.
        stride: of the first block.
        remat: keep only the blocks' inputs for the backward pass, which computes the rest again:
            less memory for about a third more work, and the same parameters and gradients.
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
) -> jax.Array:
    """Stages in a row, as layers `layer1`, ... of the module whose `__call__` calls this.

    All but the very first have stride 2.

    Args:
        x: float `[B, H, W, in]`.
        train: use and update batch statistics.
        first: number of the first of these stages, counted from 1.
        num_blocks, widths: of each.
        block: makes a block of its width, stride and name.
        remat: see `Stage`.
    """
    for number, (blocks, width) in enumerate(zip(num_blocks, widths, strict=True), first):
        stride = 1 if number == 1 else 2
        x = Stage(partial(block, width), blocks, stride, remat, name=f"layer{number}")(x, train)
    return x


def global_average(x: jax.Array) -> jax.Array:
    """Float `[B, H, W, D]` -> `[B, D]`, computed and returned in float32 or wider."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
