# SPDX-License-Identifier: Apache-2.0
"""Image operations on packed pixels; XLA compiles each to one or two loops over an image.

A packed image is uint32 `[H, W]` with red in the lowest byte, then green and blue, and nothing in
the highest. Channels are extracted by shifts, and one look-up returns all three. For photographs
this is several times as fast as `batch_ops`, which would read and write the image for every step of
the arithmetic. Small images are faster there, as a batch. The arithmetic is Pillow's to the bit,
unless an operation says otherwise; `tests/data/images/test_pixels.py` compares them. Nothing here
is random.

Every operation is compiled on first use, in a fraction of a second, once for each image size.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import tensorflow as tf

from balpoe_jax.data.images.affine import inverse_rotation

_Function = TypeVar("_Function", bound=Callable[..., tf.Tensor])
_Channels = list[tf.Tensor]

_SHIFTS = (0, 8, 16)


def compiled(function: _Function) -> _Function:
    """Makes XLA compile a function, when it is called eagerly and within other graphs."""
    return tf.function(function, jit_compile=True, autograph=False)


@compiled
def pack(images: tf.Tensor) -> tf.Tensor:
    """Values in [0, 256) of any type `[..., H, W, 3]` -> packed `[..., H, W]`; truncates floats."""
    return _pack(tf.unstack(images, axis=-1))


@compiled
def unpack(pixels: tf.Tensor) -> tf.Tensor:
    """Packed `[..., H, W]` -> uint8 `[..., H, W, 3]`."""
    return tf.cast(_bytes(pixels), tf.uint8)


def to_float(pixels: tf.Tensor) -> tf.Tensor:
    """Packed `[..., H, W]` -> float32 `[..., H, W, 3]`; for use inside compiled functions."""
    return tf.cast(tf.cast(_bytes(pixels), tf.int32), tf.float32)


@compiled
def invert(pixels: tf.Tensor) -> tf.Tensor:
    """`255 - x`."""
    return tf.bitwise.bitwise_xor(pixels, _constant(0xFFFFFF))


@compiled
def posterize(pixels: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keeps the upper `bits` bits, an int scalar from 0 to 8, of every value."""
    byte = tf.bitwise.left_shift(_constant(0xFF), tf.cast(8 - bits, tf.uint32))
    mask = tf.bitwise.bitwise_and(byte, _constant(0xFF)) * _constant(0x010101)
    return tf.bitwise.bitwise_and(pixels, mask)


@compiled
def solarize(pixels: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Inverts values at or above a float scalar."""
    return _pack([tf.where(x >= threshold, 255 - x, x) for x in _channels(pixels)])


@compiled
def solarize_add(pixels: tf.Tensor, addition: tf.Tensor) -> tf.Tensor:
    """Adds a whole number, a float scalar, to the values below 128, up to 255."""
    return _pack([tf.where(x < 128, tf.minimum(x + addition, 255), x) for x in _channels(pixels)])


@compiled
def autocontrast(pixels: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to 0..255; a channel of one value stays."""

    def stretch(values: tf.Tensor) -> tf.Tensor:
        low, high = (
            tf.cast(reduce(values), tf.float64) for reduce in (tf.reduce_min, tf.reduce_max)
        )
        scale = tf.math.divide_no_nan(tf.constant(255.0, tf.float64), high - low)
        scaled = _rounded(tf.cast(values, tf.float64) * scale)
        stretched = tf.clip_by_value(tf.floor(scaled - low * scale), 0, 255)
        return tf.where(high > low, tf.cast(stretched, tf.float32), values)

    return _pack([stretch(values) for values in _channels(pixels)])


def equalize(pixels: tf.Tensor) -> tf.Tensor:
    """Spreads each channel's values so that their histogram is even."""
    counts = tf.math.bincount(_table_entries(pixels), minlength=768, maxlength=768)
    return _equalize(pixels, counts)


@compiled
def brightness(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with black: 0 is black, 1 the image, a float scalar."""
    return _pack(_brightness(_channels(pixels), factor))


@compiled
def color(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the grey image: 0 is grey, 1 the image, a float scalar."""
    return _pack(_color(_channels(pixels), factor))


@compiled
def contrast(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the mean grey: 0 is flat, 1 the image, a float scalar."""
    return _pack(_contrast(_channels(pixels), factor))


@compiled
def sharpness(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the smoothed image: 0 is smooth, 1 the image, 2 sharp, a float scalar."""

    def sharpen(values: tf.Tensor) -> tf.Tensor:
        rows = values[:-2] + values[1:-1] + values[2:]
        box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
        center = values[1:-1, 1:-1]
        # The centre weighs 5 of 13. The sums are whole numbers, so no mean lies at a half.
        smooth = tf.floor((box + 4 * center) * (1 / 13) + 0.5)
        return _blend(smooth, center, factor)

    inner = _pack([sharpen(values) for values in _channels(pixels)])
    # The outermost pixels have no neighbourhood and stay as they are.
    inner = tf.concat([pixels[1:-1, :1], inner, pixels[1:-1, -1:]], axis=1)
    return tf.concat([pixels[:1], inner, pixels[-1:]], axis=0)


@compiled
def shift_rows(
    pixels: tf.Tensor, shift: tf.Tensor, cubic: tf.Tensor, fill: Sequence[int]
) -> tf.Tensor:
    """Shifts each row to the left by its own distance, with interpolation.

    Interpolation repeats the border; only points outside the image are `fill`. Pillow works in
    float64 and this in float32, so a result that should be whole may be one less.

    Args:
        pixels: Packed `[H, W]`.
        shift: Distance of each row in pixels, float64 `[H]`.
        cubic: Whether to interpolate cubically (a = -1) or else linearly, bool scalar.
        fill: Value of each channel outside the image.
    """
    return _shift(pixels, shift, cubic, fill, axis=1)


@compiled
def shift_columns(
    pixels: tf.Tensor, shift: tf.Tensor, cubic: tf.Tensor, fill: Sequence[int]
) -> tf.Tensor:
    """Shifts each column upwards by its own distance, float64 `[W]`; else as `shift_rows`."""
    return _shift(pixels, shift, cubic, fill, axis=0)


@compiled
def rotate(pixels: tf.Tensor, degrees: tf.Tensor, fill: Sequence[int]) -> tf.Tensor:
    """Rotates counter-clockwise by `degrees`, a float scalar, with linear interpolation.

    Interpolation repeats the border; only points outside the image are `fill`. The result differs
    from Pillow's by one level where float32 and float64 truncate differently.
    """
    height, width = pixels.shape
    a, b, c, d, e, f = tf.unstack(inverse_rotation(degrees[None], height, width)[0])
    x = tf.range(width, dtype=tf.float64) + 0.5
    y = tf.range(height, dtype=tf.float64)[:, None] + 0.5
    column, row = (tf.cast(v, tf.float32) for v in (a * x + b * y + c, d * x + e * y + f))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    left, top = tf.floor(column - 0.5), tf.floor(row - 0.5)
    across, down = column - 0.5 - left, row - 0.5 - top
    corners = [
        _channels(_look_up(pixels, tf.cast(top, tf.int32) + i, tf.cast(left, tf.int32) + j))
        for i in (0, 1)
        for j in (0, 1)
    ]

    def interpolate(v00: tf.Tensor, v01: tf.Tensor, v10: tf.Tensor, v11: tf.Tensor) -> tf.Tensor:
        upper, lower = v00 + across * (v01 - v00), v10 + across * (v11 - v10)
        return upper + down * (lower - upper)

    values = [interpolate(*channel) for channel in zip(*corners, strict=True)]
    return _filled(values, inside, fill)


def _shift(
    pixels: tf.Tensor, shift: tf.Tensor, cubic: tf.Tensor, fill: Sequence[int], axis: int
) -> tf.Tensor:
    size = pixels.shape[axis]
    shift = tf.expand_dims(shift, axis)
    first = tf.floor(shift)
    t = tf.cast(shift - first, tf.float32)
    position = tf.range(size)[None, :] if axis else tf.range(size)[:, None]
    start = tf.cast(first, tf.int32) + position
    other = tf.range(pixels.shape[1 - axis])
    other = other[:, None] if axis else other[None, :]

    def neighbours(offset: int) -> _Channels:
        along = start + offset
        where = (other, along) if axis else (along, other)
        return _channels(_look_up(pixels, *where))

    v1, v2 = neighbours(0), neighbours(1)
    linear = [low + t * (high - low) for low, high in zip(v1, v2, strict=True)]

    def bent() -> _Channels:
        v0, v3 = neighbours(-1), neighbours(2)
        weight = t * (1 - t)
        values = [
            straight + weight * (1 - t) * (b - a) + weight * t * (c - d)
            for straight, a, b, c, d in zip(linear, v0, v1, v2, v3, strict=True)
        ]
        return [tf.clip_by_value(x, 0, 255) for x in values]

    # A pixel's centre is seen if it lies in [0, size) after the shift.
    low, high = (tf.cast(tf.math.ceil(edge - 0.5 - shift), tf.int32) for edge in (0, size))
    inside = (position >= low) & (position < high)
    return tf.cond(
        cubic, lambda: _filled(bent(), inside, fill), lambda: _filled(linear, inside, fill)
    )


def _look_up(pixels: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """Pixels at int32 positions; positions beyond the border give the nearest pixel of it."""
    height, width = pixels.shape
    rows, columns = (
        tf.clip_by_value(x, 0, size - 1) for x, size in ((rows, height), (columns, width))
    )
    return tf.gather(tf.reshape(pixels, [-1]), rows * width + columns)


def _filled(values: _Channels, inside: tf.Tensor, fill: Sequence[int]) -> tf.Tensor:
    colour = sum(value << shift for value, shift in zip(fill, _SHIFTS, strict=True))
    return tf.where(inside, _pack(values), _constant(colour))


@compiled
def _table_entries(pixels: tf.Tensor) -> tf.Tensor:
    """Index of each value in the flattened tables `[3, 256]`, int32 `[3 * H * W]`."""
    planes = [tf.cast(_byte(pixels, i), tf.int32) + 256 * i for i in range(3)]
    return tf.reshape(tf.stack(planes), [-1])


@compiled
def _equalize(pixels: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
    histogram = tf.reshape(counts, [3, 256])
    occurs = tf.cast(tf.reverse(histogram, [1]) > 0, tf.int32)
    last = 255 - tf.argmax(occurs, axis=1, output_type=tf.int32)
    size = math.prod(pixels.shape)
    step = (size - tf.gather(histogram, last, axis=1, batch_dims=1)) // 255
    before = tf.cumsum(histogram, axis=1, exclusive=True)
    table = (step[:, None] // 2 + before) // tf.maximum(step, 1)[:, None]
    table = tf.where(step[:, None] > 0, tf.minimum(table, 255), tf.range(256))
    # Shifted already, so that the looked-up bytes need only be combined.
    table = tf.reshape(
        tf.bitwise.left_shift(tf.cast(table, tf.uint32), _constant(_SHIFTS)[:, None]), [-1]
    )
    parts = [tf.gather(table, tf.cast(_byte(pixels, i), tf.int32) + 256 * i) for i in range(3)]
    return _union(parts)


def _brightness(channels: _Channels, factor: tf.Tensor) -> _Channels:
    return [tf.clip_by_value(factor * x, 0, 255) for x in channels]


def _contrast(channels: _Channels, factor: tf.Tensor) -> _Channels:
    luminance = tf.cast(_luminance(channels), tf.int32)
    mean = tf.cast(tf.reduce_sum(luminance), tf.float64) / math.prod(luminance.shape)
    grey = tf.cast(tf.floor(mean + 0.5), tf.float32)
    return [_blend(grey, x, factor) for x in channels]


def _color(channels: _Channels, factor: tf.Tensor) -> _Channels:
    grey = _luminance(channels)
    return [_blend(grey, x, factor) for x in channels]


def _luminance(channels: _Channels) -> tf.Tensor:
    """ITU-R 601 luma with 16-bit weights; exact, since the weighted sums have at most 24 bits."""
    red, green, blue = channels
    return tf.floor((red * 19595 + green * 38470 + blue * 7471) * 2**-16 + 0.5)


def _blend(degenerate: tf.Tensor, values: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """`degenerate + factor * (values - degenerate)` in float32, clipped to [0, 255]."""
    return tf.clip_by_value(degenerate + _rounded(factor * (values - degenerate)), 0, 255)


def _rounded(product: tf.Tensor) -> tf.Tensor:
    """Keeps the compiler from fusing a product with an addition, since Pillow rounds the product.

    The values never reach the bounds, but the compiler cannot know that.
    """
    return tf.clip_by_value(product, -1e9, 1e9)


def _channels(pixels: tf.Tensor) -> _Channels:
    """Red, green and blue, float32 in the shape of `pixels`."""
    # Through int32, for which the processor has a conversion.
    return [tf.cast(tf.cast(_byte(pixels, i), tf.int32), tf.float32) for i in range(3)]


def _pack(channels: Sequence[tf.Tensor]) -> tf.Tensor:
    """Truncates values in [0, 256) and packs them."""
    if channels[0].dtype.is_floating:
        channels = [tf.cast(x, tf.int32) for x in channels]
    return _union(
        [
            tf.bitwise.left_shift(tf.cast(x, tf.uint32), _constant(shift))
            for x, shift in zip(channels, _SHIFTS, strict=True)
        ]
    )


def _union(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    red, green, blue = parts
    return tf.bitwise.bitwise_or(tf.bitwise.bitwise_or(red, green), blue)


def _byte(pixels: tf.Tensor, number: int) -> tf.Tensor:
    shifted = tf.bitwise.right_shift(pixels, _constant(_SHIFTS[number]))
    return tf.bitwise.bitwise_and(shifted, _constant(0xFF))


def _bytes(pixels: tf.Tensor) -> tf.Tensor:
    """uint32 `[..., 3]`."""
    shifted = tf.bitwise.right_shift(pixels[..., None], _constant(_SHIFTS))
    return tf.bitwise.bitwise_and(shifted, _constant(0xFF))


def _constant(value: int | Sequence[int]) -> tf.Tensor:
    return tf.constant(value, tf.uint32)
