# SPDX-License-Identifier: Apache-2.0
"""Image operations on batches: uint8 `[B, H, W, 3]` in and out, one parameter for each image.

They reproduce Pillow's arithmetic, which the reference's transforms run on, to the bit where 8-bit
arithmetic allows it; `tests/test_image_ops.py` compares them. Nothing here is random.
"""

import functools

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
    return _blend(tf.constant(0.0), _values(images), factor, images)


def color(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the grey image: 0 is grey, 1 the image, float `[B]`."""
    values = _values(images)
    return _blend(_luminance(values), values, factor, images)


def contrast(images: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the mean grey: 0 is flat, 1 the image, float `[B]`."""
    _, height, width, _ = images.shape
    values = _values(images)
    # Sums down the columns are exact in float32, and fast; the rest needs float64.
    lines = tf.reshape(_luminance(values), [-1, height, width * 3])
    sums = tf.cast(tf.reduce_sum(lines, axis=1), tf.float64)
    mean = tf.reduce_sum(sums, axis=1, keepdims=True) / (3 * height * width)
    return _blend(tf.cast(tf.floor(mean + 0.5), tf.float32), values, factor, images)


def color_jitter(images: tf.Tensor, factors: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
    """Changes brightness, contrast and color in turn, rounding to 8 bits after each.

    Args:
        images: uint8 `[B, H, W, 3]`.
        factors: float32 `[B, 3]` of brightness, contrast and color.
        order: int32 `[B, 3]`, permutations of 0, 1 and 2, which count them.
    """
    operations = (brightness, contrast, color)

    def one(inputs: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tf.Tensor:
        image, factors, order = inputs
        image = image[None]
        for which in tf.unstack(order):
            factor = factors[which][None]
            branches = [functools.partial(operation, image, factor) for operation in operations]
            image = tf.switch_case(which, branches)
        return image[0]

    # Image by image the values stay in the cache: twice as fast as by batch.
    return tf.map_fn(
        one,
        (images, factors, order),
        fn_output_signature=tf.TensorSpec(images.shape[1:], tf.uint8),
    )


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
    smooth = tf.where(is_inner[None, :, :, None], inner, images)
    return _blend(_values(smooth), _values(images), factor, images)


def cutout(images: tf.Tensor, top: tf.Tensor, left: tf.Tensor, size: int) -> tf.Tensor:
    """Blackens a square with its centre at int `[B]` (top, left), clipped at the border."""
    _, height, width, _ = images.shape
    rows = tf.range(height)[None, :, None] - top[:, None, None]
    columns = tf.range(width)[None, None, :] - left[:, None, None]
    half = size // 2
    inside = (rows >= -half) & (rows < half) & (columns >= -half) & (columns < half)
    return tf.where(inside[..., None], tf.constant(0, tf.uint8), images)


def _values(images: tf.Tensor) -> tf.Tensor:
    """float32 `[B, H * W * 3]`."""
    _, height, width, _ = images.shape
    return tf.reshape(tf.cast(images, tf.float32), [-1, height * width * 3])


def _luminance(values: tf.Tensor) -> tf.Tensor:
    """ITU-R 601 luma with 16-bit weights, once for each channel, float32 like the values.

    Exact, for the weighted sums have at most 24 bits. A product with three equal columns is faster
    than one column that has to be broadcast.
    """
    weights = tf.constant([[19595.0] * 3, [38470.0] * 3, [7471.0] * 3]) / 2**16
    luma = tf.floor(tf.matmul(tf.reshape(values, [-1, 3]), weights) + 0.5)
    return tf.reshape(luma, tf.shape(values))


def _blend(
    degenerate: tf.Tensor, values: tf.Tensor, factor: tf.Tensor, images: tf.Tensor
) -> tf.Tensor:
    """`degenerate + factor * (values - degenerate)` in float32, clipped, truncated, like `images`.

    `values` is float32 `[B, n]`, with which `degenerate` broadcasts.
    """
    blended = degenerate + tf.cast(factor, tf.float32)[:, None] * (values - degenerate)
    bytes_ = tf.cast(tf.clip_by_value(blended, 0, 255), tf.uint8)
    return tf.reshape(bytes_, tf.shape(images))
