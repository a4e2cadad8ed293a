# SPDX-License-Identifier: Apache-2.0
"""Blends of an image with a lesser one: brightness, contrast, color and sharpness. JAX only.

Images are packed uint32 `[H, W]`, one at a time; `jax.vmap` makes batches. To the bit as Pillow.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from balpoe_jax.data.device.packing import channels, join


def brightness(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with black: 0 is black, 1 the image; a float32 scalar."""
    return _blend([jnp.int32(0)] * 3, pixels, factor)


def contrast(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the mean grey: 0 is flat, 1 the image; a float32 scalar."""
    size = math.prod(pixels.shape)
    total = jnp.sum(luminance(pixels), dtype=jnp.int32)
    mean = (2 * total + size) // (2 * size)
    return _blend([mean] * 3, pixels, factor)


def color(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the grey image: 0 is grey, 1 the image; a float32 scalar."""
    return _blend([luminance(pixels)] * 3, pixels, factor)


def sharpness(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the smoothed image: 0 is smooth, 1 the image, 2 sharp; a float32 scalar."""
    return _blend([_smooth(values) for values in channels(pixels)], pixels, factor)


def gray(pixels: jax.Array) -> jax.Array:
    """The image without its colour."""
    return join([luminance(pixels)] * 3)


def luminance(pixels: jax.Array) -> jax.Array:
    """ITU-R 601 luma with 16-bit weights, int32 from 0 to 255."""
    red, green, blue = channels(pixels)
    return (red * 19595 + green * 38470 + blue * 7471 + (1 << 15)) >> 16


def _smooth(values: jax.Array) -> jax.Array:
    """Means of three by three, the centre of which weighs 5 of 13; int32 `[H, W]`."""
    rows = values[:-2] + values[1:-1] + values[2:]
    box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = (2 * (box + 4 * values[1:-1, 1:-1]) + 13) // 26
    # The outermost pixels have no neighbourhood and stay as they are.
    height, width = values.shape
    y = jnp.arange(height, dtype=jnp.int32)[:, None]
    x = jnp.arange(width, dtype=jnp.int32)[None, :]
    has_all = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return jnp.where(has_all, jnp.pad(inner, 1), values)


def _blend(degenerate: Sequence[jax.Array], pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """`degenerate + factor * (values - degenerate)` in float32, clipped to [0, 255]."""
    blended = []
    for low, values in zip(degenerate, channels(pixels), strict=True):
        step = factor * (values - low).astype(jnp.float32)
        # Pillow rounds the product by itself. The bounds are never met, but keep the compiler from
        # fusing product and sum.
        step = jnp.clip(step, -1e9, 1e9)
        blended.append(jnp.clip(low.astype(jnp.float32) + step, 0, 255).astype(jnp.int32))
    return join(blended)
