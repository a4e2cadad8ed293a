# SPDX-License-Identifier: Apache-2.0
"""Image operations on batches: uint8 `[B, H, W, 3]` in and out, one parameter for each image.

They reproduce the arithmetic of Pillow, which the reference's transforms use, to the bit where
8-bit arithmetic allows it; `tests/data/images/test_image_ops.py` compares them. Nothing is random.
"""

from collections.abc import Callable

import tensorflow as tf

from balpoe_jax.data.images.affine import (
    GREY,
    gather_pixels,
    inverse_rotation,
    shear_bicubic,
    source_pixels,
)


def crop_flip_rotate(
    images: tf.Tensor,
    top: tf.Tensor,
    left: tf.Tensor,
    flip: tf.Tensor,
    degrees: tf.Tensor | None,
    padding: int,
) -> tf.Tensor:
    """Zero-pads, crops to the old size, flips, then rotates, with one read for every pixel.

    Args:
        images: uint8 `[B, H, W, 3]`.
        top, left: Corner of the crop in the padded image, int32 `[B]` in `[0, 2 * padding]`.
        flip: Whether to mirror left and right, bool `[B]`.
        degrees: Angles of counter-clockwise rotations about the centre, float `[B]`; nearest
            interpolation, and black wherever the rotation shows what the crop cut off. None for no
            rotation.
        padding: Width of the padding in pixels on every side.
    """
    _, height, width, _ = images.shape
    if degrees is None:
        rows = tf.broadcast_to(tf.range(height)[None, :, None], [1, height, width])
        columns = tf.broadcast_to(tf.range(width)[None, None, :], [1, height, width])
        inside = tf.constant(True)
    else:
        rows, columns = source_pixels(inverse_rotation(degrees, height, width), height, width)
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    columns = tf.where(flip[:, None, None], width - 1 - columns, columns)
    rows = rows + (top - padding)[:, None, None]
    columns = columns + (left - padding)[:, None, None]
    return gather_pixels(images, rows, columns, inside, fill=0)


def rotate(images: tf.Tensor, degrees: tf.Tensor) -> tf.Tensor:
    """Rotates counter-clockwise by float `[B]` degrees, nearest, corners grey."""
    _, height, width, _ = images.shape
    rows, columns = source_pixels(inverse_rotation(degrees, height, width), height, width)
    return gather_pixels(images, rows, columns, tf.constant(True), fill=GREY)


def translate_x(images: tf.Tensor, pixels: tf.Tensor) -> tf.Tensor:
    """Shows what lies float `[B]` pixels to the right, nearest, grey outside."""
    return _translate(images, tf.zeros_like(pixels), pixels)


def translate_y(images: tf.Tensor, pixels: tf.Tensor) -> tf.Tensor:
    """Shows what lies float `[B]` pixels below, nearest, grey outside."""
    return _translate(images, pixels, tf.zeros_like(pixels))


def _translate(images: tf.Tensor, down: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    _, height, width, _ = images.shape
    one, zero = tf.ones_like(down), tf.zeros_like(down)
    matrix = tf.stack([one, zero, right, zero, one, down], axis=-1)
    rows, columns = source_pixels(matrix, height, width)
    return gather_pixels(images, rows, columns, tf.constant(True), fill=GREY)


def shear_x(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Reads each row float `[B]` times its y further right, bicubic, grey outside."""
    return shear_bicubic(images, factor, axis=1)


def shear_y(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Reads each column float `[B]` times its x further down, bicubic, grey outside."""
    return shear_bicubic(images, factor, axis=0)


def invert(images: tf.Tensor) -> tf.Tensor:
    """`255 - x`."""
    return 255 - images


def posterize(images: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keeps the upper int `[B]` bits, 1 to 8, of every value."""
    shift = tf.cast(8 - bits, tf.uint8)[:, None, None, None]
    return tf.bitwise.left_shift(tf.bitwise.right_shift(images, shift), shift)


def solarize(images: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Inverts values at or above float `[B]` thresholds."""
    high = tf.cast(images, tf.float32) >= threshold[:, None, None, None]
    return tf.bitwise.bitwise_xor(images, tf.cast(high, tf.uint8) * 255)


def autocontrast(images: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to 0..255; a channel of one value stays."""
    _, height, width, _ = images.shape
    lines = tf.reshape(images, [-1, height, width * 3])

    def extreme(reduce: Callable[..., tf.Tensor]) -> tf.Tensor:
        columns = tf.reshape(reduce(lines, axis=1), [-1, width, 3])
        return tf.cast(reduce(columns, axis=1), tf.float64)

    low, high = extreme(tf.reduce_min), extreme(tf.reduce_max)
    scale = tf.where(high > low, 255 / (high - low), 1)
    offset = tf.where(high > low, -low * scale, 0)
    # Computes an entry of Pillow's table for every value: twice as fast as the table.
    scale, offset = (tf.tile(x, [1, width])[:, None] for x in (scale, offset))
    stretched = tf.cast(lines, tf.float64) * scale + offset
    return tf.reshape(tf.cast(tf.clip_by_value(stretched, 0, 255), tf.uint8), tf.shape(images))


def equalize(images: tf.Tensor) -> tf.Tensor:
    """Spreads each channel's values so that their histogram is even."""
    _, height, width, _ = images.shape
    entries = _table_entries(images)
    histogram = _histogram(entries)
    occurs = tf.cast(tf.reverse(histogram, [2]) > 0, tf.int32)
    last = 255 - tf.argmax(occurs, axis=2, output_type=tf.int32)
    step = (height * width - tf.gather(histogram, last, axis=2, batch_dims=2)) // 255
    before = tf.cumsum(histogram, axis=2, exclusive=True)
    table = (step[..., None] // 2 + before) // tf.maximum(step, 1)[..., None]
    table = tf.where(step[..., None] > 0, tf.minimum(table, 255), tf.range(256))
    return _look_up(table, entries, images)


def brightness(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with black: 0 is black, 1 the image, float `[B]`."""
    return _bytes(_brightness(_values(images), factor), images)


def color(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the grey image: 0 is grey, 1 the image, float `[B]`."""
    return _bytes(_color(_values(images), factor), images)


def contrast(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the mean grey: 0 is flat, 1 the image, float `[B]`."""
    _, _, width, _ = images.shape
    return _bytes(_contrast(_values(images), factor, width), images)


def sharpness(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the smoothed image: 0 is smooth, 1 the image, 2 sharp, float `[B]`."""
    _, height, width, _ = images.shape
    values = tf.reshape(tf.cast(images, tf.float32), [-1, height, width * 3])
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    box = rows[..., :-6] + rows[..., 3:-3] + rows[..., 6:]
    # The centre weighs 5 of 13. The sums are whole numbers, so no mean lies at a half.
    smooth = tf.floor((box + 4 * values[:, 1:-1, 3:-3]) * (1 / 13) + 0.5)
    # The outermost pixels have no neighbourhood and stay as they are.
    smooth = tf.concat([values[:, 1:-1, :3], smooth, values[:, 1:-1, -3:]], axis=2)
    smooth = tf.concat([values[:, :1], smooth, values[:, -1:]], axis=1)
    smooth = tf.reshape(smooth, [-1, height * width * 3])
    return _bytes(_blend(smooth, _values(images), factor), images)


def cutout(images: tf.Tensor, top: tf.Tensor, left: tf.Tensor, size: int) -> tf.Tensor:
    """Blackens a square with its centre at int `[B]` (top, left), clipped at the border."""
    _, height, width, _ = images.shape
    rows = tf.range(height)[None, :, None] - top[:, None, None]
    columns = tf.range(width)[None, None, :] - left[:, None, None]
    half = size // 2
    inside = (rows >= -half) & (rows < half) & (columns >= -half) & (columns < half)
    return tf.where(inside[..., None], tf.constant(0, tf.uint8), images)


def _table_entries(images: tf.Tensor) -> tf.Tensor:
    """Index of each value in the flattened tables `[B, 3, 256]`, int32 `[B, H * W * 3]`."""
    batch = tf.shape(images)[0]
    _, height, width, _ = images.shape
    channels = tf.constant([0, 256, 512] * (height * width))
    values = tf.cast(tf.reshape(images, [batch, height * width * 3]), tf.int32)
    return values + channels + 768 * tf.range(batch)[:, None]


def _histogram(entries: tf.Tensor) -> tf.Tensor:
    """How often each value occurs, int32 `[B, 3, 256]`."""
    size = 768 * tf.shape(entries)[0]
    counts = tf.math.bincount(tf.reshape(entries, [-1]), minlength=size, maxlength=size)
    return tf.reshape(counts, [-1, 3, 256])


def _look_up(tables: tf.Tensor, entries: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Replaces each value by its table's, uint8, in the shape of `like`."""
    mapped = tf.gather(tf.reshape(tf.cast(tables, tf.uint8), [-1]), entries)
    return tf.reshape(mapped, tf.shape(like))


def _values(images: tf.Tensor) -> tf.Tensor:
    """float32 `[B, H * W * 3]`."""
    _, height, width, _ = images.shape
    return tf.reshape(tf.cast(images, tf.float32), [-1, height * width * 3])


def _bytes(values: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Values in [0, 256), truncated to uint8 in the shape of `like`."""
    return tf.reshape(tf.cast(values, tf.uint8), tf.shape(like))


def _brightness(values: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(tf.cast(factor, tf.float32)[:, None] * values, 0, 255)


def _color(values: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return _blend(_luminance(values), values, factor)


def _contrast(values: tf.Tensor, factor: tf.Tensor, width: int) -> tf.Tensor:
    size = values.shape[1]
    # Sums down the columns are exact in float32, and fast; the rest needs float64.
    lines = tf.reshape(_luminance(values), [-1, size // (width * 3), width * 3])
    sums = tf.cast(tf.reduce_sum(lines, axis=1), tf.float64)
    mean = tf.floor(tf.reduce_sum(sums, axis=1, keepdims=True) / size + 0.5)
    return _blend(tf.cast(mean, tf.float32), values, factor)


def _luminance(values: tf.Tensor) -> tf.Tensor:
    """ITU-R 601 luma with 16-bit weights, once for each channel, float32 like the values.

    Exact, because the weighted sums have at most 24 bits. A product with three equal columns is
    faster than one column that has to be broadcast.
    """
    weights = tf.constant([[19595.0] * 3, [38470.0] * 3, [7471.0] * 3]) / 2**16
    luma = tf.floor(tf.matmul(tf.reshape(values, [-1, 3]), weights) + 0.5)
    return tf.reshape(luma, tf.shape(values))


def _blend(degenerate: tf.Tensor, values: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """`degenerate + factor * (values - degenerate)` in float32, clipped to [0, 255].

    `values` is float32 `[B, n]`, with which `degenerate` broadcasts.
    """
    step = tf.cast(factor, tf.float32)[:, None] * (values - degenerate)
    return tf.clip_by_value(degenerate + step, 0, 255)
