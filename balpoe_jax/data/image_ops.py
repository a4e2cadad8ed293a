# SPDX-License-Identifier: Apache-2.0
"""Image operations on batches: uint8 `[B, H, W, 3]` in and out, one parameter for each image.

They reproduce Pillow's arithmetic, which the reference's transforms run on, to the bit where 8-bit
arithmetic allows it; `tests/test_image_ops.py` compares them. Nothing here is random.
"""

import tensorflow as tf

from balpoe_jax.data.affine import (
    GREY,
    gather_pixels,
    inverse_rotation,
    sample_bicubic,
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
    """Zero-pads, crops to the old size, flips, then rotates: one read for every pixel.

    Args:
        images: uint8 `[B, H, W, 3]`.
        top, left: int32 `[B]`, corner of the crop within the padded image, in `[0, 2 * padding]`.
        flip: bool `[B]`, mirror left and right.
        degrees: float `[B]`, counter-clockwise about the centre, nearest interpolation, zero fill
            also where only the crop's outside would be seen; None for no rotation.
        padding: pixels on every side.
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
    one, zero = tf.ones_like(factor), tf.zeros_like(factor)
    return sample_bicubic(images, tf.stack([one, factor, zero, zero, one, zero], axis=-1))


def shear_y(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Reads each column float `[B]` times its x further down, bicubic, grey outside."""
    one, zero = tf.ones_like(factor), tf.zeros_like(factor)
    return sample_bicubic(images, tf.stack([one, zero, zero, factor, one, zero], axis=-1))


def invert(images: tf.Tensor) -> tf.Tensor:
    """`255 - x`."""
    return 255 - images


def posterize(images: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keeps the upper int `[B]` bits of every value."""
    shift = tf.cast(8 - bits, tf.uint8)[:, None, None, None]
    return tf.bitwise.left_shift(tf.bitwise.right_shift(images, shift), shift)


def solarize(images: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Inverts values at or above float `[B]` thresholds."""
    high = tf.cast(images, tf.float32) >= threshold[:, None, None, None]
    return tf.where(high, 255 - images, images)


def autocontrast(images: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to 0..255; a channel of one value stays."""
    values = tf.cast(images, tf.float64)
    low = tf.reduce_min(values, axis=(1, 2), keepdims=True)
    high = tf.reduce_max(values, axis=(1, 2), keepdims=True)
    scale = tf.math.divide_no_nan(tf.constant(255.0, tf.float64), high - low)
    stretched = tf.clip_by_value(tf.floor(values * scale + -low * scale), 0, 255)
    return tf.where(high > low, tf.cast(stretched, tf.uint8), images)


def equalize(images: tf.Tensor) -> tf.Tensor:
    """Spreads each channel's values so that their histogram is even."""
    batch = tf.shape(images)[0]
    _, height, width, channels = images.shape
    planes = tf.cast(tf.reshape(tf.transpose(images, [0, 3, 1, 2]), [-1, height * width]), tf.int32)
    histogram = tf.math.bincount(planes, minlength=256, maxlength=256, axis=-1)
    last = 255 - tf.argmax(tf.reverse(histogram, [1]) > 0, axis=1, output_type=tf.int32)
    step = (height * width - tf.gather(histogram, last, axis=1, batch_dims=1)) // 255
    before = tf.cumsum(histogram, axis=1, exclusive=True)
    table = (step[:, None] // 2 + before) // tf.maximum(step, 1)[:, None]
    table = tf.where(step[:, None] > 0, tf.minimum(table, 255), tf.range(256)[None])
    mapped = tf.reshape(
        tf.gather(table, planes, axis=1, batch_dims=1), [batch, channels, height, width]
    )
    return tf.cast(tf.transpose(mapped, [0, 2, 3, 1]), tf.uint8)


def brightness(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with black: 0 is black, 1 the image, float `[B]`."""
    return _blend(tf.zeros_like(images), images, factor)


def color(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the grey image: 0 is grey, 1 the image, float `[B]`."""
    return _blend(tf.cast(_luminance(images), tf.uint8), images, factor)


def contrast(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the mean grey: 0 is flat, 1 the image, float `[B]`."""
    luminance = tf.cast(_luminance(images), tf.float64)
    mean = tf.floor(tf.reduce_mean(luminance, axis=(1, 2), keepdims=True) + 0.5)
    return _blend(tf.cast(mean, tf.uint8), images, factor)


def sharpness(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the smoothed image: 0 is smooth, 1 the image, 2 sharp, float `[B]`."""
    values = tf.cast(images, tf.float32)
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32) / 13
    kernel = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    smooth = tf.nn.depthwise_conv2d(values, kernel, [1, 1, 1, 1], "VALID")
    smooth = tf.cast(tf.clip_by_value(tf.floor(smooth + 0.5), 0, 255), tf.uint8)
    # The outermost pixels have no neighbourhood and stay as they are.
    inner = tf.pad(smooth, [[0, 0], [1, 1], [1, 1], [0, 0]])
    _, height, width, _ = images.shape
    is_inner = tf.pad(tf.ones([height - 2, width - 2], tf.bool), [[1, 1], [1, 1]])
    return _blend(tf.where(is_inner[None, :, :, None], inner, images), images, factor)


def cutout(images: tf.Tensor, top: tf.Tensor, left: tf.Tensor, size: int) -> tf.Tensor:
    """Blackens a square with its centre at int `[B]` (top, left), clipped at the border."""
    _, height, width, _ = images.shape
    rows = tf.range(height)[None, :, None] - top[:, None, None]
    columns = tf.range(width)[None, None, :] - left[:, None, None]
    half = size // 2
    inside = (rows >= -half) & (rows < half) & (columns >= -half) & (columns < half)
    return tf.where(inside[..., None], tf.constant(0, tf.uint8), images)


def _luminance(images: tf.Tensor) -> tf.Tensor:
    """ITU-R 601 luma in 16-bit fixed point, int32 `[B, H, W, 1]`."""
    weights = tf.constant([19595, 38470, 7471], tf.int32)
    total = tf.reduce_sum(tf.cast(images, tf.int32) * weights, axis=-1, keepdims=True)
    return tf.bitwise.right_shift(total + 0x8000, 16)


def _blend(degenerate: tf.Tensor, images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """`degenerate + factor * (images - degenerate)` in float32, clipped and truncated."""
    start = tf.cast(degenerate, tf.float32)
    step = tf.cast(images, tf.float32) - start
    blended = start + tf.cast(factor, tf.float32)[:, None, None, None] * step
    return tf.cast(tf.clip_by_value(blended, 0, 255), tf.uint8)
