# SPDX-License-Identifier: Apache-2.0
"""Convolutions of stacked experts: one for each expert in place of a grouped one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# Layouts of images, kernels and results in which GPUs compute; the kernels of Flax are "HWIO".
_GPU = ("NHWC", "OHWI", "NHWC")

# Number of channels from which XLA transposes an expert's kernel in a GPU kernel of its own.
_TILE = 64


def conv_by_expert(
    lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, which becomes one convolution for each expert under `vmap`.

    JAX's own rule makes a single grouped convolution, whose gradients are slow on GPUs (jax#13800,
    jax#26266). The numbers are the same. A gradient has to be taken of the mapped function: there
    is none without `vmap`.

    Args:
        lhs: Images `[B, H, W, in]`.
        rhs: Kernel `[h, w, in, out]`.
        window_strides, padding, **options: Other arguments of that function, as Flax passes them.
    """
    convolve: Callable[..., jax.Array] = partial(
        jax.lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options
    )
    mapped = jax.custom_batching.custom_vmap(convolve)

    @mapped.def_vmap
    def one_by_one(size: int, stacked: Any, lhs: jax.Array, rhs: jax.Array) -> Any:
        if not stacked[0]:  # one convolution of all experts' channels, without groups
            return jax.vmap(convolve, (None, 0))(lhs, rhs), True
        of_expert = partial(convolve, dimension_numbers=_GPU)
        kernels = _kernels(rhs)
        return jnp.stack([of_expert(lhs[i], kernels[i]) for i in range(size)]), True

    return mapped(lhs, rhs)


def _kernels(stacked: jax.Array) -> Any:
    """Kernels `[E, h, w, in, out]` as E of `[out, h, w, in]`, in as few GPU kernels as possible."""
    if min(stacked.shape[-2:]) < _TILE:
        return jnp.moveaxis(stacked, -1, 1)
    return [jnp.moveaxis(kernel, -1, 0) for kernel in stacked]
