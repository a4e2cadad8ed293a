# SPDX-License-Identifier: Apache-2.0
"""Packed pixels: uint32 with red in the lowest byte, then green and blue.

One read returns all channels of a pixel, which shifts extract within one kernel. Data sets lie in
device memory in this form: a TPU would copy bytes `[N, H, W, 3]` into another layout in each step.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

SHIFTS = (0, 8, 16)


def pack(images: jax.Array) -> jax.Array:
    """Bytes `[..., 3]` to packed `[...]`."""
    return join([images[..., i] for i in range(3)])


def pack_on_host(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """`pack` in NumPy, for images that are to be placed on devices."""
    packed = np.zeros(images.shape[:-1], np.uint32)
    for i, shift in enumerate(SHIFTS):
        packed |= images[..., i].astype(np.uint32) << np.uint32(shift)
    return packed


def as_packed(images: jax.Array) -> jax.Array:
    """Packed `[...]` from either form: uint8 `[..., 3]`, or packed already."""
    return images if images.dtype == jnp.uint32 else pack(images)


def unpack(pixels: jax.Array) -> jax.Array:
    """Packed `[...]` to uint8 `[..., 3]`."""
    # Not a stack of channels: a TPU would write each channel to memory first.
    shifts = np.array(SHIFTS, np.uint32).reshape([1] * pixels.ndim + [3])
    return ((pixels[..., None] >> shifts) & 0xFF).astype(jnp.uint8)


def channels(pixels: jax.Array) -> list[jax.Array]:
    """Red, green and blue, int32 in the shape of `pixels`."""
    return [((pixels >> shift) & 0xFF).astype(jnp.int32) for shift in SHIFTS]


def join(parts: Sequence[jax.Array]) -> jax.Array:
    """Packs red, green and blue, whole numbers from 0 to 255 of any integer type."""
    red, green, blue = (
        part.astype(jnp.uint32) << shift for part, shift in zip(parts, SHIFTS, strict=True)
    )
    return red | green | blue


def packed_colour(colour: Sequence[int]) -> int:
    """A colour, three values from 0 to 255, as one number."""
    return sum(value << shift for value, shift in zip(colour, SHIFTS, strict=True))


def for_all_pixels(numbers: Sequence[jax.Array], shape: tuple[int, ...]) -> list[jax.Array]:
    """Numbers of images, broadcast to their pixels.

    A TPU then computes with them in the kernel of the pixels. Otherwise each small array that is
    computed from them takes a kernel of its own.

    Args:
        numbers: Arrays `[..., 1]`.
        shape: Shape of the pixels, without leading axes that only the numbers have.
    """
    wide = [jnp.broadcast_to(x, (*x.shape[: x.ndim - len(shape)], *shape)) for x in numbers]
    keep = jax.lax.optimization_barrier  # one each: together they would all vary by device
    return jax.lax.platform_dependent(
        wide, tpu=lambda wide: [keep(x) for x in wide], default=lambda wide: wide
    )
