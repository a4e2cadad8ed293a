# SPDX-License-Identifier: Apache-2.0
"""Shears and shifts with interpolation: rows or columns that move by distances of their own.

The host turns distances into whole numbers, for devices have no float64. The weights have 40 bits
behind the point: a value comes out other than from exact weights only where the exact result lies
within 1e-9 of a whole number and is none, or where Pillow's own rounding decides.
"""

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.packing import channels, join

_LIMB = 20


def line_weights(shifts: np.ndarray, cubic: np.ndarray) -> dict[str, np.ndarray]:
    """What `shift_lines` needs to move lines by distances.

    Args:
        shifts: Distances in pixels, float64 `[n, lines]`.
        cubic: Whether to interpolate cubically (a = -1) or else linearly, bool `[n]`.

    Returns:
        first: int16 `[n, lines]`, whole pixels of the distance, rounded down.
        nearest: int16 `[n, lines]`, the same, rounded to the nearest.
        high, low: int32 `[n, lines, 4]`, weights of four neighbours in two parts of 20 bits.
    """
    first = np.floor(shifts)
    t = shifts - first
    square = t * t
    cube = square * t
    bent = [2 * square - cube - t, None, t + square - cube, cube - square]
    zero = np.zeros_like(t)
    straight = [zero, None, t, zero]
    weights = np.empty((*t.shape, 4), np.int64)
    for i in (0, 2, 3):
        chosen = np.where(cubic[:, None], bent[i], straight[i])
        weights[..., i] = np.rint(chosen * 2.0 ** (2 * _LIMB))
    # What is constant stays so, exactly.
    weights[..., 1] = (1 << (2 * _LIMB)) - weights[..., [0, 2, 3]].sum(axis=-1)
    return {
        "first": first.astype(np.int16),
        "nearest": np.floor(shifts + 0.5).astype(np.int16),
        "high": (weights >> _LIMB).astype(np.int32),
        "low": (weights & ((1 << _LIMB) - 1)).astype(np.int32),
    }


def shift_lines(pixels: jax.Array, drawn: dict[str, jax.Array], axis: int, fill: int) -> jax.Array:
    """Shows in each row what lies so far to the right (axis 1), or in each column below (axis 0).

    Neighbours beyond the border repeat it; only points outside the image are `fill`.

    Args:
        pixels: Packed `[H, W]`.
        drawn: Those of `line_weights`, a row of them; lines beyond the image's are ignored.
        axis: Along which the lines move.
        fill: Packed colour.
    """
    size, lines = pixels.shape[axis], pixels.shape[1 - axis]

    def across(leaf: jax.Array) -> jax.Array:
        """One number for each line, against the pixels."""
        return jnp.expand_dims(leaf[:lines].astype(jnp.int32), axis)

    position = jnp.expand_dims(jnp.arange(size, dtype=jnp.int32), 1 - axis)
    start = position + across(drawn["first"])
    sums = [(jnp.int32(0), jnp.int32(0))] * 3
    for i in range(4):
        there = jnp.clip(start + (i - 1), 0, size - 1)
        neighbours = channels(
            jnp.take_along_axis(pixels, there, axis=axis, mode="promise_in_bounds")
        )
        high, low = across(drawn["high"][:, i]), across(drawn["low"][:, i])
        sums = [
            (total[0] + high * values, total[1] + low * values)
            for total, values in zip(sums, neighbours, strict=True)
        ]
    values = [jnp.clip((high + (low >> _LIMB)) >> _LIMB, 0, 255) for high, low in sums]
    seen = position + across(drawn["nearest"])
    return jnp.where((seen >= 0) & (seen < size), join(values), jnp.uint32(fill))
