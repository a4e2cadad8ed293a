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
    # The fill is one more pixel to pick: twice as fast as to select by channel afterwards.
    beyond = tf.fill([1, 3], tf.constant(fill, tf.uint8))
    pixels = tf.concat([tf.reshape(images, [-1, 3]), beyond], axis=0)
    outside = batch * height * width
    return tf.gather(pixels, tf.where(inside, first + rows * width + columns, outside))


def sample_bicubic(images: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """Transforms by float `[B, 6]` matrices with cubic interpolation (a = -1), grey outside.

    Neighbours beyond the border repeat it; only points outside the image are grey.
    """
    _, height, width, _ = images.shape
    a, b, c, d, e, f = (x[:, None, None] for x in tf.unstack(tf.cast(matrix, tf.float64), axis=-1))
    x = tf.range(width, dtype=tf.float64)[None, None, :] + 0.5
    y = tf.range(height, dtype=tf.float64)[None, :, None] + 0.5
    column, row = a * x + b * y + c, d * x + e * y + f
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    left, top = tf.floor(column - 0.5), tf.floor(row - 0.5)
    across, down = (column - 0.5 - left)[..., None], (row - 0.5 - top)[..., None]
    lefts = [tf.clip_by_value(tf.cast(left, tf.int32) + i, 0, width - 1) for i in range(-1, 3)]
    tops = [tf.clip_by_value(tf.cast(top, tf.int32) + i, 0, height - 1) for i in range(-1, 3)]

    def pixel(row: tf.Tensor, column: tf.Tensor) -> tf.Tensor:
        return tf.cast(gather_pixels(images, row, column, tf.constant(True), 0), tf.float64)

    lines = [_cubic([pixel(row, column) for column in lefts], across) for row in tops]
    values = tf.cast(tf.clip_by_value(_cubic(lines, down), 0, 255), tf.uint8)
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
