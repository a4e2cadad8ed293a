# SPDX-License-Identifier: Apache-2.0
"""Changes of each value by itself: invert, posterize, solarize, autocontrast and equalize.

Images are packed uint32 `[H, W]`, one at a time; `jax.vmap` makes batches. Equal to Pillow's to the
bit.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.arithmetic import divide
from balpoe_jax.data.device.packing import channels, for_all_pixels, join

# Number of bits of an entry of `autocontrast_table` that are for its parts.
_PLACES = 18

# Arguments with which `change_points` changes nothing.
NO_CHANGE = {"mask": 255, "addition": 0, "threshold": 256}


def change_points(pixels: jax.Array, mask: Any, addition: Any, threshold: Any) -> jax.Array:
    """Posterizes, then adds to dark values, then inverts light ones.

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
        table: Table of `autocontrast_table`, on the device.
    """
    return stretch(pixels.reshape(-1), table).reshape(pixels.shape)


def stretch(pixels: jax.Array, table: jax.Array) -> jax.Array:
    """`autocontrast` of images `[..., n]`."""
    parts = channels(pixels)
    low = jnp.stack([jnp.min(values, axis=-1, keepdims=True) for values in parts])
    high = jnp.stack([jnp.max(values, axis=-1, keepdims=True) for values in parts])
    # Unsigned, or else every index is tested for being negative.
    which = ((low << 8) + high).astype(jnp.uint32)
    entries = table.at[which].get(mode="promise_in_bounds").astype(jnp.int32)
    ends = for_all_pixels([low, high, entries], pixels.shape)
    return join([_stretch(values, *own) for values, *own in zip(parts, *ends, strict=True)])


def _stretch(values: jax.Array, low: jax.Array, high: jax.Array, entry: jax.Array) -> jax.Array:
    """Stretches values from `low..high` to 0..255, with an entry of `autocontrast_table`."""
    spread = jnp.maximum(high - low, 1)
    scaled = (values - low) * 255
    stretched = divide(scaled, spread)
    # A result that is exactly whole becomes one less where the table says so.
    which = (stretched * (entry >> _PLACES) + 128) >> 8
    less = (stretched * spread == scaled) & (((entry >> which) & 1) == 1)
    return jnp.where(high > low, stretched - less.astype(jnp.int32), values)


@functools.cache
def autocontrast_table() -> np.ndarray:
    """Where Pillow gets one less than an exact whole result, by least and greatest value.

    Pillow computes in float64, which devices lack, and may get one less where the exact result is
    whole. The values with whole results divide the range into equal parts, at most 17 where Pillow
    errs at all. Bit k of an entry says whether the value at the end of part k becomes one less. The
    bits from 18 on hold the number of parts.

    Returns:
        uint32 `[256 * 256]`.
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
    # Without it, the tables would be computed again for each pixel.
    tables = jax.lax.optimization_barrier(even_tables(_below(parts), parts.shape[1]))
    spread = jnp.take_along_axis(tables, parts, axis=1, mode="promise_in_bounds")
    return join([part.reshape(pixels.shape) for part in spread])


def even_tables(below: jax.Array, size: int) -> jax.Array:
    """The result of `equalize` for each value, int32 `[..., 256]`.

    Args:
        below: Number of values that are less than each, int32 `[..., 256]`.
        size: Number of values in all.
    """
    # The number of values except those that equal the greatest.
    others = jnp.max(jnp.where(below < size, below, 0), axis=-1, keepdims=True)
    (others,) = for_all_pixels([others], below.shape)
    step = divide(others, 255)
    tables = jnp.minimum(divide(step // 2 + below, jnp.maximum(step, 1)), 255)
    values = jnp.arange(256, dtype=jnp.int32).reshape([1] * (below.ndim - 1) + [256])
    return jnp.where(step > 0, tables, values)


def _below(parts: jax.Array) -> jax.Array:
    """The number of values below 0, 1, ... 255: Pillow's running sum of the histogram.

    Args:
        parts: Values from 0 to 255, int32 `[3, n]` with `n` at most `2**24`.

    Returns:
        int32 `[3, 256]`.
    """
    return jax.lax.platform_dependent(parts, cpu=below_by_counting, default=below_by_product)


def below_by_counting(parts: jax.Array) -> jax.Array:
    """`_below` by a histogram, for CPUs: on accelerators its additions would be serialized."""
    entries = parts + 256 * jnp.arange(3, dtype=jnp.int32)[:, None]
    none = jnp.zeros_like(parts, shape=(3 * 256,))
    counts = none.at[entries.reshape(-1)].add(1, mode="promise_in_bounds").reshape(3, 256)
    return jnp.cumsum(counts, axis=1) - counts


def below_by_product(parts: jax.Array) -> jax.Array:
    """`_below` as one product of matrices of zeros and ones, which is exact; for `[..., n]`.

    A value is less if its upper four bits are less, or if they are equal and its lower four bits
    are less. The values occur twice in the product, once for each case.
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
