# SPDX-License-Identifier: Apache-2.0
"""Rotation with linear interpolation, in whole numbers.

Positions have 32 bits behind the point, in two parts. Values differ from Pillow's only where it
truncates within a millionth of a whole number.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.packing import channels, join

_PART = 16
_VALUE_BITS = 22
_SHARE_BITS = 15


def turn_matrices(matrix: list[np.ndarray]) -> np.ndarray:
    """Matrices of six float64 `[n]` from output to input points as int32 `[n, 2, 6]`.

    They start at the centre of the first pixel, and have the order of `moves.source_pixels`. The
    two parts are units of `2**-16`, and `2**-16` parts of these.
    """
    a, b, c, d, e, f = matrix
    entries = np.stack([c + a * 0.5 + b * 0.5, a, b, f + d * 0.5 + e * 0.5, d, e], axis=-1)
    whole = np.rint(entries * 2.0 ** (2 * _PART)).astype(np.int64)
    return np.stack([whole >> _PART, whole % (1 << _PART)], axis=-2).astype(np.int32)


def turn(pixels: jax.Array, matrix: jax.Array, fill: int) -> jax.Array:
    """Rotates an image, which reads it at points between its pixels.

    Interpolation repeats the border; only points outside the image are `fill`.

    Args:
        pixels: Packed uint32 `[H, W]`.
        matrix: Row of `turn_matrices`, int32 `[2, 6]`.
        fill: Packed colour.
    """
    height, width = pixels.shape
    column, across = _positions(matrix[:, :3], height, width)
    row, down = _positions(matrix[:, 3:], height, width)
    inside = [(x >> _PART >= 0) & (x >> _PART < n) for x, n in ((column, width), (row, height))]
    # Relative to the centres of pixels.
    column, row = column - (1 << (_PART - 1)), row - (1 << (_PART - 1))
    flat = pixels.reshape(-1)
    corners = []
    for i in (0, 1):
        for j in (0, 1):
            there = jnp.clip((row >> _PART) + i, 0, height - 1) * width
            there = there + jnp.clip((column >> _PART) + j, 0, width - 1)
            corners.append(channels(flat.at[there].get(mode="promise_in_bounds")))
    rest = (1 << _PART) - 1
    values = [
        _interpolate(channel, (column & rest, across), (row & rest, down))
        for channel in zip(*corners, strict=True)
    ]
    return jnp.where(inside[0] & inside[1], join(values), jnp.uint32(fill))


def _positions(entries: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """One coordinate of all points, in the two parts of `turn_matrices`; int32 `[H, W]` each."""
    x = jnp.arange(width, dtype=jnp.int32)[None, :]
    y = jnp.arange(height, dtype=jnp.int32)[:, None]
    high, low = (start + by_column * x + by_row * y for start, by_column, by_row in entries)
    return high + (low >> _PART), low & ((1 << _PART) - 1)


_Share = tuple[jax.Array, jax.Array]


def _interpolate(corners: Sequence[jax.Array], across: _Share, down: _Share) -> jax.Array:
    """The value between four corners, rounded down."""
    v00, v01, v10, v11 = corners

    def line(start: jax.Array, end: jax.Array) -> jax.Array:
        high, low = ((end - start) * share for share in across)
        whole = (start << _VALUE_BITS) + (high << (_VALUE_BITS - _PART))
        return whole + (low >> (2 * _PART - _VALUE_BITS))

    upper = line(v00, v01)
    difference = line(v10, v11) - upper
    # Products of 15 bits each; the product of both last parts is beyond the precision.
    share = down[0] >> (_PART - _SHARE_BITS)
    rest = ((down[0] & 1) << (_SHARE_BITS - 1)) + (down[1] >> (2 * _PART - 2 * _SHARE_BITS))
    high, low = difference >> _SHARE_BITS, difference & ((1 << _SHARE_BITS) - 1)
    moved = share * high + ((share * low + rest * high) >> _SHARE_BITS)
    # Both lines and the product were rounded down; 1 is the middle of their error.
    return (upper + moved + 1) >> _VALUE_BITS
