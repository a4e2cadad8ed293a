# SPDX-License-Identifier: Apache-2.0
"""Affine resampling of image batches with Pillow's arithmetic.

A matrix `(a, b, c, d, e, f)` maps the centre of an output pixel to a point of the input:
`x' = a x + b y + c`, `y' = d x + e y + f`.
"""

import math
from collections.abc import Sequence

import tensorflow as tf

GREY = 128

# Pillow steps through the nearest-neighbour transform in 16.16 fixed point.
_FRACTION_BITS = 16


def inverse_rotation(degrees: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Matrices float64 `[B, 6]` of a counter-clockwise rotation about the centre by `[B]` degrees.

    The entries are rounded to 15 decimals, as Pillow does before it computes the offsets.
    """
    radians = -tf.cast(degrees, tf.float64) * (math.pi / 180)
    cosine, sine = _round_15(tf.cos(radians)), _round_15(tf.sin(radians))
    center_x, center_y = width / 2, height / 2
    offset_x = cosine * -center_x + sine * -center_y + center_x
    offset_y = -sine * -center_x + cosine * -center_y + center_y
    return tf.stack([cosine, sine, offset_x, -sine, cosine, offset_y], axis=-1)


def source_pixels(matrix: tf.Tensor, height: int, width: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Nearest input pixel of every output pixel: rows and columns, int32 `[B, H, W]`."""
    a, b, c, d, e, f = tf.unstack(tf.cast(matrix, tf.float64), axis=-1)
    columns = _fixed_point_line(a, b, c + a * 0.5 + b * 0.5, height, width)
    rows = _fixed_point_line(d, e, f + d * 0.5 + e * 0.5, height, width)
    return rows, columns


def gather_pixels(
    images: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor, inside: tf.Tensor, fill: int
) -> tf.Tensor:
    """Pixels at int32 `[B, H, W]` positions; `fill` outside the image or where not `inside`."""
    _, height, width, _ = images.shape
    batch = tf.shape(images)[0]
    inside = inside & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    first = tf.range(batch)[:, None, None] * (height * width)
    # The fill is one more pixel to gather: twice as fast as a selection by channel afterwards.
    beyond = tf.fill([1, 3], tf.constant(fill, tf.uint8))
    pixels = tf.concat([tf.reshape(images, [-1, 3]), beyond], axis=0)
    outside = batch * height * width
    return tf.gather(pixels, tf.where(inside, first + rows * width + columns, outside))


def shear_bicubic(images: tf.Tensor, factor: tf.Tensor, axis: int) -> tf.Tensor:
    """Shifts each row (axis 1) or column (axis 0) by its position times a factor, grey outside.

    Interpolates cubically (a = -1) along the axis, in float64 as Pillow does. Neighbours beyond the
    border repeat it; only points outside the image are grey.

    Args:
        images: uint8 `[B, H, W, 3]`.
        factor: float `[B]`.
        axis: Axis along which the lines move, 1 for rows and 0 for columns.
    """
    _, height, width, _ = images.shape
    size = (height, width)[axis]
    x = tf.range(width, dtype=tf.float64)[None, None, :] + 0.5
    y = tf.range(height, dtype=tf.float64)[None, :, None] + 0.5
    along, across = (x, y) if axis else (y, x)
    position = along + tf.cast(factor, tf.float64)[:, None, None] * across
    inside = (position >= 0) & (position < size)
    first = tf.floor(position - 0.5)
    t = (position - 0.5 - first)[..., None]
    other = tf.broadcast_to(tf.cast(across, tf.int32), tf.shape(position))

    def neighbours(offset: int) -> tf.Tensor:
        there = tf.clip_by_value(tf.cast(first, tf.int32) + offset, 0, size - 1)
        where = (other, there) if axis else (there, other)
        return tf.cast(gather_pixels(images, *where, tf.constant(True), 0), tf.float64)

    values = _cubic([neighbours(offset) for offset in range(-1, 3)], t)
    values = tf.cast(tf.clip_by_value(values, 0, 255), tf.uint8)
    return tf.where(inside[..., None], values, tf.constant(GREY, tf.uint8))


def _fixed_point_line(
    by_column: tf.Tensor, by_row: tf.Tensor, start: tf.Tensor, height: int, width: int
) -> tf.Tensor:
    """`floor(start + by_column * x + by_row * y)` in fixed point, int32 `[B, H, W]`."""
    start, by_column, by_row = (
        tf.cast(tf.floor(x * 2**_FRACTION_BITS + 0.5), tf.int32)[:, None, None]
        for x in (start, by_column, by_row)
    )
    x, y = tf.range(width)[None, None, :], tf.range(height)[None, :, None]
    return tf.bitwise.right_shift(start + by_column * x + by_row * y, _FRACTION_BITS)


def _cubic(values: Sequence[tf.Tensor], t: tf.Tensor) -> tf.Tensor:
    """Cubic convolution (a = -1) of four values at `t` in [0, 1) between the middle two.

    In Horner's form, which rounds as Pillow does.
    """
    v0, v1, v2, v3 = values
    return v1 + t * (v2 - v0 + t * (2 * (v0 - v1) + v2 - v3 + t * (v1 - v0 - v2 + v3)))


def _round_15(x: tf.Tensor) -> tf.Tensor:
    return tf.round(x * 1e15) / 1e15
