# SPDX-License-Identifier: Apache-2.0
"""Blends of an image with a degenerate one: brightness, contrast, color and sharpness. JAX only.

Images are packed uint32 `[H, W]`, one at a time; `jax.vmap` makes batches. Equal to Pillow's to the
bit.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.arithmetic import divide
from balpoe_jax.data.device.packing import channels, join


def brightness(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with black: 0 is black, 1 the image; a float32 scalar."""
    return _blend([jnp.int32(0)] * 3, pixels, factor)


def contrast(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the mean grey: 0 is flat, 1 the image; a float32 scalar."""
    return blend_with_grey(pixels, mean_grey(pixels.reshape(-1)), factor)


def mean_grey(pixels: jax.Array) -> jax.Array:
    """The rounded mean of the luminance of `[..., n]`, int32 `[...]`."""
    size = pixels.shape[-1]
    total = jnp.sum(luminance(pixels), axis=-1, dtype=jnp.int32)
    return divide(2 * total + size, 2 * size)


def blend_with_grey(pixels: jax.Array, grey: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with one grey, an int32 from 0 to 255: 0 is grey, 1 the image."""
    return _blend([grey] * 3, pixels, factor)


def color(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the grey image: 0 is grey, 1 the image; a float32 scalar."""
    return _blend([luminance(pixels)] * 3, pixels, factor)


def sharpness(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the smoothed image: 0 is smooth, 1 the image, 2 sharp; a float32 scalar."""
    flat = pixels.reshape(-1)
    return sharpen(flat, factor, *pixels.shape).reshape(pixels.shape)


def sharpen(pixels: jax.Array, factor: jax.Array, height: int, width: int) -> jax.Array:
    """`sharpness` of images `[..., height * width]`, with factors that broadcast to them."""
    return _blend(_smooth(pixels, height, width), pixels, factor)


def gray(pixels: jax.Array) -> jax.Array:
    """The image without its colour."""
    return join([luminance(pixels)] * 3)


def luminance(pixels: jax.Array) -> jax.Array:
    """ITU-R 601 luma with 16-bit weights, int32 from 0 to 255."""
    red, green, blue = channels(pixels)
    return (red * 19595 + green * 38470 + blue * 7471 + (1 << 15)) >> 16


def _smooth(pixels: jax.Array, height: int, width: int) -> list[jax.Array]:
    """Means of three by three whose centre weighs 5 of 13; three int32 `[..., n]`."""
    size = height * width
    padded = jnp.pad(pixels, [(0, 0)] * (pixels.ndim - 1) + [(width + 1, width + 1)])
    starts = [y * width + x for y in range(3) for x in range(3)]

    def totals(read: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return sum((read(padded[..., i : i + size]) for i in starts), 4 * read(pixels))

    # Red and blue share one number: totals take 12 bits at most.
    both, green = totals(lambda x: x & 0xFF00FF), totals(lambda x: (x >> 8) & 0xFF)
    # The outermost pixels have no neighbourhood and stay as they are.
    has_all = np.zeros((height, width), bool)
    has_all[1:-1, 1:-1] = True
    has_all = has_all.reshape([1] * (pixels.ndim - 1) + [size])
    return [
        # Divided by 26, as a product.
        jnp.where(has_all, ((2 * total.astype(jnp.int32) + 13) * 40330) >> 20, values)
        for total, values in zip((both & 0xFFFF, green, both >> 16), channels(pixels), strict=True)
    ]


def _blend(degenerate: Sequence[jax.Array], pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """`degenerate + factor * (values - degenerate)` in float32, clipped to [0, 255]."""
    blended = []
    for low, values in zip(degenerate, channels(pixels), strict=True):
        step = factor * (values - low).astype(jnp.float32)
        # Pillow rounds the product. The bounds, which are never reached, keep the compiler from
        # fusing it with the sum.
        step = jnp.clip(step, -1e9, 1e9)
        blended.append(jnp.clip(low.astype(jnp.float32) + step, 0, 255).astype(jnp.int32))
    return join(blended)
