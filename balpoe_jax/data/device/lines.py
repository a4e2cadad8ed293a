# SPDX-License-Identifier: Apache-2.0
"""Shears and shifts with interpolation: rows or columns that move by distances of their own.

The host turns distances into whole numbers, for devices have no float64. The weights have 60 bits
behind the point, in three parts, because Pillow truncates: a value that ends a hair below a whole
number is one less. Exact results that are whole where the distance is not (at a shear of 0.2, say)
come out as such here, and in Pillow now and then as one less, as its rounding in float64 decides.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.packing import channels, join

_PART = 20
_PARTS = 3
# For each unit of a value: in all three quarters of a unit in its last place in float64, below
# which what is missing to a whole number is lost in Pillow.
_HAIR = 96
# Of a point between two pixels, from the one before it.
NEIGHBOURS = (-1, 0, 1, 2)


def line_weights(
    shifts: np.ndarray, cubic: np.ndarray, rounded_along: int = 0
) -> dict[str, np.ndarray]:
    """What `shift_lines` needs to move lines by distances.

    Args:
        shifts: Distances in pixels, float64 `[n, lines]`.
        cubic: Whether to interpolate cubically (a = -1) or else linearly, bool `[n]`.
        rounded_along: Length of the lines, by which distances are rounded as Pillow's sums along
            them are; 0 for distances as they are.

    Returns:
        first: int16 `[n, lines]`, whole pixels of the distance, rounded down.
        nearest: int16 `[n, lines]`, the same, rounded to the nearest.
        weights: int32 `[n, lines, 3, 4]`, those of four neighbours, in three parts of 20 bits.
    """
    first = np.floor(shifts)
    t = shifts - first
    if rounded_along:
        # As three quarters along the line: in half of all pixels the same.
        point = np.rint(0.75 * rounded_along - shifts) + 0.5 + shifts - 0.5
        t = point - np.floor(point)
    # From the nearer of the middle two, where small weights are known most exactly.
    mirrored = t > 0.5
    t = np.where(mirrored, 1 - t, t)
    bent = cubic[:, None] * t
    far, opposite = -bent * (1 - t) ** 2, -bent * t * (1 - t)
    whole = np.zeros((*t.shape, 4), np.int64)
    for i, weight in ((0, far), (2, t + bent * (1 - t) * t), (3, opposite)):
        whole[..., i] = np.rint(weight * 2.0 ** (_PARTS * _PART))
    # What is constant stays so, exactly.
    whole[..., 1] = (1 << (_PARTS * _PART)) - whole.sum(axis=-1)
    whole = np.where(mirrored[..., None], whole[..., ::-1], whole)
    parts = [whole >> (2 * _PART), (whole >> _PART) % (1 << _PART), whole % (1 << _PART)]
    return {
        "first": first.astype(np.int16),
        "nearest": np.floor(shifts + 0.5).astype(np.int16),
        "weights": np.stack(parts, axis=-2).astype(np.int32),
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
        neighbours: Packed pixels, those of `NEIGHBOURS`.
        weights: For each of three parts those of the neighbours, int32.
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
