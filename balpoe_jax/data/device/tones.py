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

from balpoe_jax.data.device.arithmetic import divide
from balpoe_jax.data.device.packing import channels, for_all_pixels, join

# Bits of an entry of `autocontrast_table` that tell of parts.
_PLACES = 18

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
    return stretch(pixels.reshape(-1), table).reshape(pixels.shape)


def stretch(pixels: jax.Array, table: jax.Array) -> jax.Array:
    """`autocontrast` of images `[..., n]`."""
    parts = channels(pixels)
    low = jnp.stack([jnp.min(values, axis=-1, keepdims=True) for values in parts])
    high = jnp.stack([jnp.max(values, axis=-1, keepdims=True) for values in parts])
    # Unsigned, else each is looked at for whether it is negative.
    which = ((low << 8) + high).astype(jnp.uint32)
    entries = table.at[which].get(mode="promise_in_bounds").astype(jnp.int32)
    ends = for_all_pixels([low, high, entries], pixels.shape)
    return join([_stretch(values, *own) for values, *own in zip(parts, *ends, strict=True)])


def _stretch(values: jax.Array, low: jax.Array, high: jax.Array, entry: jax.Array) -> jax.Array:
    """Brings values from `low..high` to 0..255, with an entry of `autocontrast_table`."""
    spread = jnp.maximum(high - low, 1)
    scaled = (values - low) * 255
    stretched = divide(scaled, spread)
    # What is a whole number is one less where the table says so.
    which = (stretched * (entry >> _PLACES) + 128) >> 8
    less = (stretched * spread == scaled) & (((entry >> which) & 1) == 1)
    return jnp.where(high > low, stretched - less.astype(jnp.int32), values)


@functools.cache
def autocontrast_table() -> np.ndarray:
    """Where Pillow makes one less of a whole number, uint32 `[256 * 256]` by least and greatest.

    Pillow computes in float64, which devices lack, and where exact results are whole numbers it may
    come out at one less. Values that become whole numbers divide the range into up to 17 equal
    parts, if Pillow errs at all. How many they are is above bit 17, and whether the value at the
    end of part k becomes one less is bit k.
    """
    table = np.zeros((256, 256), np.uint32)
    for low in range(256):
        for high in range(low + 1, 256):
            parts = math.gcd(high - low, 255)
            values = low + np.arange(parts + 1) * ((high - low) // parts)
            scale = 255 / (high - low)
            made = np.clip(values * scale + -low * scale, 0, 255).astype(np.int64)
            less = np.flatnonzero(made < np.arange(parts + 1) * (255 // parts))
            if less.size:
                table[low, high] = (parts << _PLACES) + (1 << less).sum()
    table.setflags(write=False)
    return table.reshape(-1)


def equalize(pixels: jax.Array) -> jax.Array:
    """Spreads each channel's values so that their histogram is even."""
    parts = jnp.stack(channels(pixels)).reshape(3, math.prod(pixels.shape))
    # Else it would be computed for each pixel.
    tables = jax.lax.optimization_barrier(even_tables(_below(parts), parts.shape[1]))
    spread = jnp.take_along_axis(tables, parts, axis=1, mode="promise_in_bounds")
    return join([part.reshape(pixels.shape) for part in spread])


def even_tables(below: jax.Array, size: int) -> jax.Array:
    """What `equalize` makes of each value, int32 `[..., 256]`.

    Args:
        below: How many values are less than each, int32 `[..., 256]`.
        size: Number of values in all.
    """
    # All but those of the greatest value.
    others = jnp.max(jnp.where(below < size, below, 0), axis=-1, keepdims=True)
    (others,) = for_all_pixels([others], below.shape)
    step = divide(others, 255)
    tables = jnp.minimum(divide(step // 2 + below, jnp.maximum(step, 1)), 255)
    values = jnp.arange(256, dtype=jnp.int32).reshape([1] * (below.ndim - 1) + [256])
    return jnp.where(step > 0, tables, values)


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
    """`_below` as one product of matrices of zeros and ones, which is exact; of `[..., n]`.

    Of each value those whose upper four bits are less, and of those whose upper bits are the same
    the ones whose lower four are: in the product the values come twice.
    """
    size = parts.shape[-1]
    ones = [1] * (parts.ndim - 1)
    digits = np.arange(16, dtype=np.int32).reshape(*ones, 16, 1)
    same = (np.arange(2 * size) < size).reshape(*ones, 1, 2 * size)
    twice = jnp.concatenate([parts, parts], axis=-1)[..., None, :]
    upper, lower = twice >> 4, twice & 15
    rows = jnp.where(same, upper == digits, upper < digits)
    columns = (lower < digits) | ~same
    ahead = tuple(range(parts.ndim - 1))
    product = jax.lax.dot_general(
        rows.astype(jnp.bfloat16),
        columns.astype(jnp.bfloat16),
        (((parts.ndim,), (parts.ndim,)), (ahead, ahead)),
        preferred_element_type=jnp.float32,
    )
    return product.astype(jnp.int32).reshape(*parts.shape[:-1], 256)
