# SPDX-License-Identifier: Apache-2.0
"""Pillow's Gaussian blur, to the bit: three passes of a box in each direction."""

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.packing import SHIFTS, join

_PASSES = 3
_ONE_BITS = 24


def box_weights(sigma: np.ndarray) -> np.ndarray:
    """Weights of a box at distances of 0, 1 and 2 pixels, in parts of `2**24`.

    Args:
        sigma: Standard deviations in pixels, float32 `[n]` from 0 to 2.4.

    Returns:
        int32 `[n, 3]`.
    """
    one = np.float32(1 << _ONE_BITS)
    sigma = np.asarray(sigma, np.float32)
    variance = sigma * sigma / np.float32(_PASSES)
    length = np.sqrt(12 * variance.astype(np.float64) + 1).astype(np.float32)
    whole = np.floor((length - np.float32(1)) / np.float32(2))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - (whole + 1) * (whole + 1)))
    full = (one / ((whole + part) * 2 + 1)).astype(np.int64)
    end = ((1 << _ONE_BITS) - (2 * whole.astype(np.int64) + 1) * full) // 2
    narrow = whole < 1
    weights = [full, np.where(narrow, end, full), np.where(narrow, 0, end)]
    return np.stack(weights, axis=-1).astype(np.int32)


def blur(pixels: jax.Array, weights: jax.Array) -> jax.Array:
    """Blurs an image.

    Args:
        pixels: Packed uint32 `[H, W]`.
        weights: Row of `box_weights`, int32 `[3]`.
    """
    parts = weights.astype(jnp.uint32)
    for axis in (1, 0):
        # As a loop: unrolled, each pass may be computed again for every neighbour of the next.
        pixels = jax.lax.fori_loop(
            0, _PASSES, lambda _, image, axis=axis: _box(image, parts, axis), pixels
        )
    return pixels


def _box(pixels: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
    """One pass along an axis; the outermost pixels repeat beyond the border."""
    size = pixels.shape[axis]
    position = jnp.arange(size, dtype=jnp.int32)
    lines = [
        jnp.take(pixels, jnp.clip(position + offset, 0, size - 1), axis=axis, mode="clip")
        for offset in (-2, -1, 0, 1, 2)
    ]
    middle, near, far = weights

    def mean(shift: int) -> jax.Array:
        # Fits into 32 bits: the weights sum to 2**24, and values are less than 2**8.
        v0, v1, v2, v3, v4 = ((line >> shift) & 0xFF for line in lines)
        total = middle * v2 + near * (v1 + v3) + far * (v0 + v4)
        return (total + (1 << (_ONE_BITS - 1))) >> _ONE_BITS

    return join([mean(shift) for shift in SHIFTS])
