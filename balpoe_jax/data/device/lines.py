# SPDX-License-Identifier: Apache-2.0
"""Shears and shifts with interpolation: each row or column moves by its own distance.

The host turns distances into whole numbers, since devices have no float64. Pillow truncates, so a
value just below a whole number becomes one less. To get the same, the weights have 60 bits behind
the point, in three parts. One difference is left: where the exact result is whole but the distance
is not (at a shear of 0.2, say), Pillow's rounding in float64 sometimes gives one less.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.packing import channels, join

_PART = 20
_PARTS = 3
# Added for each unit of a value: three quarters of the value's last place in float64. A value that
# is closer to the next whole number is that number in Pillow.
_HAIR = 96
# Neighbours of a point between two pixels, relative to the pixel before it.
NEIGHBOURS = (-1, 0, 1, 2)


def line_weights(
    shifts: np.ndarray, cubic: np.ndarray, rounded_along: int = 0
) -> dict[str, np.ndarray]:
    """The whole numbers by which `shift_lines` moves lines.

    Args:
        shifts: Distances in pixels, float64 `[n, lines]`.
        cubic: Whether to interpolate cubically (a = -1) or else linearly, bool `[n]`.
        rounded_along: Length of the lines, to round distances as Pillow's sums along a line do; 0
            for no rounding.

    Returns:
        first: Whole pixels of the distance, rounded down, int16 `[n, lines]`.
        nearest: Whole pixels of the distance, rounded to the nearest, int16 `[n, lines]`.
        weights: Weights of four neighbours in three parts of 20 bits, int32 `[n, lines, 3, 4]`.
    """
    first = np.floor(shifts)
    t = shifts - first
    if rounded_along:
        # Rounded as three quarters along the line, which is the rounding of half of all pixels.
        point = np.rint(0.75 * rounded_along - shifts) + 0.5 + shifts - 0.5
        t = point - np.floor(point)
    # Measured from the nearer of the middle two, where small weights are most exact.
    mirrored = t > 0.5
    t = np.where(mirrored, 1 - t, t)
    bent = cubic[:, None] * t
    far, opposite = -bent * (1 - t) ** 2, -bent * t * (1 - t)
    whole = np.zeros((*t.shape, 4), np.int64)
    for i, weight in ((0, far), (2, t + bent * (1 - t) * t), (3, opposite)):
        whole[..., i] = np.rint(weight * 2.0 ** (_PARTS * _PART))
    # The weights sum to exactly 1, so that a constant stays constant.
    whole[..., 1] = (1 << (_PARTS * _PART)) - whole.sum(axis=-1)
    whole = np.where(mirrored[..., None], whole[..., ::-1], whole)
    parts = [whole >> (2 * _PART), (whole >> _PART) % (1 << _PART), whole % (1 << _PART)]
    return {
        "first": first.astype(np.int16),
        "nearest": np.floor(shifts + 0.5).astype(np.int16),
        "weights": np.stack(parts, axis=-2).astype(np.int32),
    }


def shift_lines(pixels: jax.Array, drawn: dict[str, jax.Array], axis: int, fill: int) -> jax.Array:
    """Shifts each row to the left (axis 1), or each column upwards (axis 0), by its distance.

    Interpolation repeats the border; only points outside the image are `fill`.

    Args:
        pixels: Packed `[H, W]`.
        drawn: Row of `line_weights`; more lines than the image has are ignored.
        axis: Axis along which the lines move.
        fill: Packed colour.
    """
    size, lines = pixels.shape[axis], pixels.shape[1 - axis]

    def across(leaf: jax.Array) -> jax.Array:
        """One number for each line, in a shape that broadcasts to the pixels."""
        return jnp.expand_dims(leaf[:lines].astype(jnp.int32), axis)

    position = jnp.expand_dims(jnp.arange(size, dtype=jnp.int32), 1 - axis)
    start = position + across(drawn["first"])
    neighbours = [
        jnp.take_along_axis(
            pixels, jnp.clip(start + offset, 0, size - 1), axis, mode="promise_in_bounds"
        )
        for offset in NEIGHBOURS
    ]
    weights = [[across(drawn["weights"][:, part, i]) for i in range(4)] for part in range(_PARTS)]
    seen = position + across(drawn["nearest"])
    return jnp.where(
        (seen >= 0) & (seen < size), interpolate(neighbours, weights), jnp.uint32(fill)
    )


def interpolate(
    neighbours: Sequence[jax.Array], weights: Sequence[Sequence[jax.Array]]
) -> jax.Array:
    """Weighted sums of four neighbours, rounded down as Pillow does.

    Args:
        neighbours: Packed pixels at the positions `NEIGHBOURS`.
        weights: Weights of the neighbours for each of three parts, int32.
    """
    values = [channels(pixels) for pixels in neighbours]

    def weighted(channel: int) -> jax.Array:
        high, middle, low = (
            sum(weight * own[channel] for weight, own in zip(part, values, strict=True))
            for part in weights
        )
        hair = jnp.clip(high >> _PART, 0, 255) * _HAIR
        carried = (middle + ((low + hair) >> _PART)) >> _PART
        return jnp.clip((high + carried) >> _PART, 0, 255)

    return join([weighted(channel) for channel in range(3)])
