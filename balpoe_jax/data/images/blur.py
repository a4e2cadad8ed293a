# SPDX-License-Identifier: Apache-2.0
"""Pillow's Gaussian blur, to the bit; the contrastive methods' views use it.

Pillow's `GaussianBlur(radius)`, whose radius is the standard deviation, approximates the Gaussian
by three passes of a box with fractional ends in each direction, rounded to 8 bits after each
(Gwosdek et al., SSVM 2011); beyond the border the outermost pixels repeat.
"""

import tensorflow as tf

from balpoe_jax.data.images import packed_ops

_PASSES = 3
_ONE = 1 << 24


def box_weights(sigma: tf.Tensor) -> tf.Tensor:
    """Weights of a box at distances of 0, 1 and 2 pixels, int64 `[..., 3]`.

    They sum to 2**24, up to rounding, with those at distances 1 and 2 counted twice.

    Args:
        sigma: Standard deviations in pixels, float32 `[...]` from 0 to 2.4; a wider box would reach
            beyond two pixels.
    """
    variance = sigma * sigma / _PASSES
    length = tf.cast(tf.sqrt(12 * tf.cast(variance, tf.float64) + 1), tf.float32)
    whole = tf.floor((length - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) * (whole + 1))
    full = tf.cast(_ONE / ((whole + part) * 2 + 1), tf.int64)
    end = (_ONE - (2 * tf.cast(whole, tf.int64) + 1) * full) // 2
    narrow = whole < 1
    near = tf.where(narrow, end, full)
    return tf.stack([full, near, tf.where(narrow, tf.zeros_like(end), end)], axis=-1)


@packed_ops.compiled
def blur(image: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Blurs an image.

    Args:
        image: Packed `[H, W]`, see `packed_ops`.
        weights: Weights of `box_weights`, int64 `[3]`.

    Returns:
        Packed `[H, W]`.
    """
    values = tf.cast(packed_ops.to_float(image), tf.int64)
    for axis in (1, 0):
        for _ in range(_PASSES):
            values = _box(values, weights, axis)
    return packed_ops.pack(values)


def _box(values: tf.Tensor, weights: tf.Tensor, axis: int) -> tf.Tensor:
    """One pass along an axis of int64 `[H, W, 3]`."""
    size = values.shape[axis]

    def at(offset: int) -> tf.Tensor:
        return tf.gather(values, tf.clip_by_value(tf.range(size) + offset, 0, size - 1), axis=axis)

    middle, near, far = tf.unstack(weights)
    total = middle * values + near * (at(-1) + at(1)) + far * (at(-2) + at(2))
    return tf.bitwise.right_shift(total + _ONE // 2, tf.constant(24, tf.int64))
