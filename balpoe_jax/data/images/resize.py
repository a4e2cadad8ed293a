# SPDX-License-Identifier: Apache-2.0
"""Pillow's bilinear resizing, which the reference's transforms use.

It is separable: every output line is a weighted mean of input lines, with a triangle of weights
that widens when the image shrinks. TensorFlow's `ScaleAndTranslate` computes the same weights. It
is fast only along the first axis, where whole lines are added at once. So both passes run there,
with a transpose between them, which is twice as fast as one call for both axes.
"""

import tensorflow as tf

from balpoe_jax.data.images import packed_ops

_WEIGHT_BITS = 22


def resize(
    image: tf.Tensor,
    full_size: tuple[tf.Tensor | int, tf.Tensor | int],
    size: tuple[int, int],
    corner: tuple[tf.Tensor | float, tf.Tensor | float] = (0, 0),
    flip: tf.Tensor | None = None,
    packed: bool = False,
) -> tf.Tensor:
    """Resizes an image, or makes only a window of the resized image.

    The width is resized first and rounded to 8 bits, then the height, as in Pillow before 13.
    (Pillow 13 begins with the height where that is cheaper, such as when the height shrinks and the
    width grows. The order changes up to a quarter of the values by one level.)

    Pillow's weights have 22 bits and these are float32, so values at a half may round the other
    way. That changes 0.1% of the values of a typical photograph by one level, and up to 4% where a
    simple ratio such as 5 / 4 makes halves common. Two levels are rare.

    Args:
        image: uint8 `[h, w, 3]`.
        full_size: Height and width to which all of `image` is scaled.
        size: Height and width of the result.
        corner: Top and left of the result within the scaled image.
        flip: Whether to mirror left and right afterwards, bool scalar; None for no.
        packed: Whether to return packed pixels, see `packed_ops`.

    Returns:
        uint8 `[*size, 3]`, or packed `[*size]`.
    """
    shape = tf.shape(image)
    height, width = shape[0], shape[1]
    # As matrices: transposing three axes, the last of length 3, takes twice as long.
    columns = tf.reshape(tf.transpose(tf.reshape(image, [height, width * 3])), [width, 3 * height])
    columns = _rounded(_resample(columns, full_size[1], size[1], corner[1]))
    if flip is not None:
        order = tf.range(size[1])
        columns = tf.gather(columns, tf.where(flip, size[1] - 1 - order, order))
    rows = tf.transpose(tf.reshape(columns, [size[1] * 3, height]))
    rows = _resample(rows, full_size[0], size[0], corner[0])
    rows = tf.reshape(rows, [*size, 3])
    return _packed(rows) if packed else _rounded(rows)


def enlarge_windows(images: tf.Tensor, windows: tf.Tensor) -> tf.Tensor:
    """Resizes a window of each image of a batch to the size of the image, as `resize` would.

    When enlarging, each pixel is a mean of two by two. These are gathered for the whole batch at
    once and weighted as in Pillow, with 22 bits, so that the result is Pillow's to the bit.

    Args:
        images: uint8 `[B, H, W, 3]`.
        windows: Top, left, height and width within the image, int32 `[B, 4]`.
    """
    top, left, height, width = tf.unstack(windows, axis=1)
    wide = _enlarge(images, left, width, axis=2)
    return _enlarge(wide, top, height, axis=1)


def _enlarge(images: tf.Tensor, start: tf.Tensor, length: tf.Tensor, axis: int) -> tf.Tensor:
    """Enlarges the part of an axis from int32 `[B]` starts, of int32 `[B]` lengths, to its size."""
    size = images.shape[axis]
    step = tf.cast(length, tf.float64)[:, None] / size
    position = (tf.range(size, dtype=tf.float64) + 0.5) * step - 0.5
    before = tf.floor(position)
    share = position - before
    first = tf.cast(before, tf.int32)

    def weighted(line: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        line = tf.clip_by_value(line, 0, length[:, None] - 1) + start[:, None]
        whole = tf.cast(tf.floor(weight * 2**_WEIGHT_BITS + 0.5), tf.int32)
        shape = [-1, 1, size, 1] if axis == 2 else [-1, size, 1, 1]
        lines = tf.cast(tf.gather(images, line, axis=axis, batch_dims=1), tf.int32)
        return lines * tf.reshape(whole, shape)

    total = weighted(first, 1 - share) + weighted(first + 1, share) + (1 << _WEIGHT_BITS - 1)
    return tf.cast(tf.bitwise.right_shift(total, _WEIGHT_BITS), tf.uint8)


def _resample(
    lines: tf.Tensor, full_size: tf.Tensor | int, size: int, start: tf.Tensor | float
) -> tf.Tensor:
    """Scales uint8 `[n, L]` from n to `full_size` lines; returns `size` from `start`, float32."""
    scale = tf.cast(full_size, tf.float32) / tf.cast(tf.shape(lines)[0], tf.float32)
    scaled = tf.raw_ops.ScaleAndTranslate(
        images=lines[None, :, None, :],
        size=[size, 1],
        scale=tf.stack([scale, 1.0]),
        translation=tf.stack([-tf.cast(start, tf.float32), 0.0]),
        kernel_type="triangle",
        antialias=True,
    )
    return scaled[0, :, 0, :]


def _rounded(means: tf.Tensor) -> tf.Tensor:
    """Rounds to uint8; weighted means of bytes need no clipping."""
    return tf.cast(means + 0.5, tf.uint8)


@packed_ops.compiled
def _packed(means: tf.Tensor) -> tf.Tensor:
    return packed_ops.pack(means + 0.5)
