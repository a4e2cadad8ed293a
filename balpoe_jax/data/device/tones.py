# SPDX-License-Identifier: Apache-2.0
"""Changes of each value by itself: invert, posterize, solarize, autocontrast and equalize.

Images are packed uint32 `[H, W]`, one at a time; `jax.vmap` makes batches. To the bit as Pillow.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.packing import channels, join

# What `change_points` does without a change.
NO_CHANGE = {"mask": 255, "addition": 0, "threshold": 256}


def change_points(pixels: jax.Array, mask: Any, addition: Any, threshold: Any) -> jax.Array:
    """Posterizes, then brightens the dark and at last inverts the light.

    Args:
        pixels: Packed `[H, W]`.
        mask: Bits of every value to keep, int32 scalar.
        addition: Number to add to the values below 128, up to 255, int32 scalar.
        threshold: Value from which values are inverted, int32 scalar.
    """
    changed = []
    for values in channels(pixels):
        values = values & mask
        values = jnp.where(values < 128, jnp.minimum(values + addition, 255), values)
        changed.append(jnp.where(values >= threshold, 255 - values, values))
    return join(changed)


def autocontrast(pixels: jax.Array, table: jax.Array) -> jax.Array:
    """Stretches each channel to 0..255; a channel of one value stays.

    Args:
        pixels: Packed `[H, W]`.
        table: `autocontrast_table()`, on the device.
    """
    stretched = []
    for values in channels(pixels):
        # The least, the greatest and the value are the bytes of an entry's number.
        line = (jnp.min(values) << 16) + (jnp.max(values) << 8)
        stretched.append(table.at[line + values].get(mode="promise_in_bounds"))
    return join(stretched)


@functools.cache
def autocontrast_table() -> np.ndarray:
    """What Pillow makes of each value, uint8 `[256 * 256 * 256]` by least, greatest and value.

    Pillow computes in float64, which devices lack, and where exact results are whole numbers it may
    come out at one less.
    """
    table = np.empty((256, 256, 256), np.uint8)
    values = np.arange(256, dtype=np.float64)
    for low in range(256):
        table[low, : low + 1] = values
        spread = np.arange(1, 256 - low, dtype=np.float64)[:, None]
        scale = 255 / spread
        table[low, low + 1 :] = np.clip(values * scale + -low * scale, 0, 255)
    table.setflags(write=False)
    return table.reshape(-1)


def equalize(pixels: jax.Array) -> jax.Array:
    """Spreads each channel's values so that their histogram is even."""
    parts = jnp.stack(channels(pixels)).reshape(3, math.prod(pixels.shape))
    below = _below(parts)
    greatest = jnp.max(parts, axis=1, keepdims=True)
    # All pixels but those of the greatest value.
    step = jnp.take_along_axis(below, greatest, axis=1, mode="promise_in_bounds") // 255
    tables = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    tables = jnp.where(step > 0, tables, jnp.arange(256, dtype=jnp.int32)[None, :])
    # Else it would be computed for each pixel.
    tables = jax.lax.optimization_barrier(tables)
    spread = jnp.take_along_axis(tables, parts, axis=1, mode="promise_in_bounds")
    return join([part.reshape(pixels.shape) for part in spread])


def _below(parts: jax.Array) -> jax.Array:
    """How many values are less than 0, 1, ... 255: Pillow's running sum of the histogram.

    Args:
        parts: Values from 0 to 255, int32 `[3, n]` with `n` at most `2**24`.

    Returns:
        int32 `[3, 256]`.
    """
    return jax.lax.platform_dependent(parts, cpu=below_by_counting, default=below_by_product)


def below_by_counting(parts: jax.Array) -> jax.Array:
    """`_below` value by value, for CPUs: accelerators would wait for each other's additions."""
    entries = parts + 256 * jnp.arange(3, dtype=jnp.int32)[:, None]
    none = jnp.zeros_like(parts, shape=(3 * 256,))
    counts = none.at[entries.reshape(-1)].add(1, mode="promise_in_bounds").reshape(3, 256)
    return jnp.cumsum(counts, axis=1) - counts


def below_by_product(parts: jax.Array) -> jax.Array:
    """`_below` as a product of matrices of zeros and ones, which is exact.

    Of each value those whose upper four bits are less, and of those whose upper bits are the same
    the ones whose lower four are.
    """
    digits = jnp.arange(17, dtype=jnp.int32)[None, :, None]
    upper, lower = parts[:, None] >> 4, parts[:, None] & 15
    # All lower bits are less than 16, so the last column counts the values of the same upper ones.
    same, less = upper == digits[:, :16], lower < digits
    inner = jax.lax.dot_general(
        same.astype(jnp.bfloat16),
        less.astype(jnp.bfloat16),
        (((2,), (2,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    ).astype(jnp.int32)
    totals = inner[:, :, 16]
    outer = jnp.cumsum(totals, axis=1) - totals
    return (outer[:, :, None] + inner[:, :, :16]).reshape(3, 256)
