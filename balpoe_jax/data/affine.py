# SPDX-License-Identifier: Apache-2.0
"""Affine resampling of image batches with Pillow's arithmetic.

A matrix `(a, b, c, d, e, f)` maps the centre of an output pixel to a point of the input:
`x' = a x + b y + c`, `y' = d x + e y + f`.
"""

import math
from collections.abc import Sequence

import numpy as np
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


def shift_rows(
    images: tf.Tensor, shift: tf.Tensor, cubic: tf.Tensor, fill: Sequence[int]
) -> tf.Tensor:
    """Shows in each row what lies so many pixels to the right.

    Neighbours beyond the border repeat it; only points outside the image are `fill`. Pillow works
    in float64 and this in float32: where the exact result is a whole number, it may be one less.

    Args:
        images: uint8 `[B, H, W, 3]`.
        shift: float `[B, H]`.
        cubic: bool `[B]`, cubic (a = -1) or else linear interpolation.
        fill: one value for each channel.
    """
    _, height, width, _ = images.shape
    first = tf.floor(shift)
    t = tf.cast(shift - first, tf.float32)[..., None]
    # One look-up brings the neighbours of all pixels of a row, which then are slices.
    columns = tf.cast(first, tf.int32)[..., None] + tf.range(-1, width + 2)
    columns = tf.reshape(tf.clip_by_value(columns, 0, width - 1), [-1, width + 3])
    lines = tf.reshape(images, [-1, 3])
    lines = tf.gather(lines, columns + width * tf.range(tf.shape(columns)[0])[:, None])
    lines = tf.reshape(tf.cast(lines, tf.float32), [-1, height, (width + 3) * 3])
    v0, v1, v2, v3 = (lines[..., 3 * i : 3 * (i + width)] for i in range(4))
    values = v1 + t * (v2 - v1)

    def add_cubic_part() -> tf.Tensor:
        weight = tf.cast(cubic, tf.float32)[:, None, None] * t * (1 - t)
        bent = values + weight * (1 - t) * (v1 - v0) + weight * t * (v2 - v3)
        return tf.clip_by_value(bent, 0, 255)

    values = tf.cond(tf.reduce_any(cubic), add_cubic_part, lambda: values)
    # A pixel's centre is seen if it lies in [0, width) after the shift.
    x = tf.constant(np.repeat(np.arange(width), 3), tf.float32)
    start, stop = (
        tf.cast(tf.math.ceil(edge - 0.5 - shift), tf.float32)[..., None] for edge in (0, width)
    )
    return _finish(values, (x >= start) & (x < stop), fill, images)


def rotate_linear(images: tf.Tensor, degrees: tf.Tensor, fill: Sequence[int]) -> tf.Tensor:
    """Rotates counter-clockwise by float `[B]` degrees with linear interpolation.

    Neighbours beyond the border repeat it; only points outside the image are `fill`. Differs from
    Pillow by one level where float32 and float64 truncate differently.

    Args:
        images: uint8 `[B, H, W, 3]`.
        degrees: float `[B]`.
        fill: one value for each channel.
    """
    _, height, width, _ = images.shape
    matrix = inverse_rotation(degrees, height, width)
    a, b, c, d, e, f = tf.unstack(matrix, axis=-1)
    # The operation counts from the centre of the first pixel, and clamps to the last.
    zero = tf.zeros_like(a)
    transforms = [a, b, c + (a + b - 1) / 2, d, e, f + (d + e - 1) / 2, zero, zero]
    values = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images, tf.float32),
        transforms=tf.cast(tf.stack(transforms, axis=1), tf.float32),
        output_shape=[height, width],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="NEAREST",
    )
    x, y = np.repeat(np.arange(width) + 0.5, 3), np.arange(height) + 0.5
    column = _line(a, b, c - width / 2, x, y)
    row = _line(d, e, f - height / 2, x, y)
    inside = (tf.abs(column) < width / 2) & (tf.abs(row) < height / 2)
    return _finish(tf.reshape(values, tf.shape(column)), inside, fill, images)


def _line(
    by_x: tf.Tensor, by_y: tf.Tensor, start: tf.Tensor, x: np.ndarray, y: np.ndarray
) -> tf.Tensor:
    """`by_x * x + by_y * y + start`, float32 `[B, len(y), len(x)]`."""
    across, down = by_x[:, None] * x, by_y[:, None] * y + start[:, None]
    return tf.cast(across, tf.float32)[:, None, :] + tf.cast(down, tf.float32)[:, :, None]


def _finish(
    values: tf.Tensor, inside: tf.Tensor, fill: Sequence[int], images: tf.Tensor
) -> tf.Tensor:
    """Truncates float32 `[B, H, W * 3]` values; those not `inside` become `fill`."""
    truncated = tf.cast(values, tf.uint8)
    _, _, width, _ = images.shape
    # Select is slow; inside is 255 or 0, all bits or none.
    mask = tf.cast(inside, tf.uint8) * 255
    colour = tf.bitwise.bitwise_and(
        tf.bitwise.invert(mask), tf.constant(list(fill) * width, tf.uint8)
    )
    return tf.reshape(
        tf.bitwise.bitwise_or(tf.bitwise.bitwise_and(truncated, mask), colour), tf.shape(images)
    )


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
