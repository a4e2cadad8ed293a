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
    table = table.reshape(-1)
    table.setflags(write=False)
    return table


def equalize(pixels: jax.Array) -> jax.Array:
    """Spreads each channel's values so that their histogram is even."""
    parts = jnp.stack(channels(pixels)).reshape(3, 1, math.prod(pixels.shape))
    entries = jnp.arange(256, dtype=jnp.int32)[None, :]
    # How many pixels are below each value: Pillow's running sum of the histogram.
    below = jnp.sum(parts < entries[:, :, None], axis=2, dtype=jnp.int32)
    greatest = jnp.max(parts, axis=2)
    # All pixels but those of the greatest value.
    step = jnp.take_along_axis(below, greatest, axis=1, mode="promise_in_bounds") // 255
    tables = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    tables = jnp.where(step > 0, tables, entries)
    spread = jnp.take_along_axis(tables, parts[:, 0], axis=1, mode="promise_in_bounds")
    return join([part.reshape(pixels.shape) for part in spread])
