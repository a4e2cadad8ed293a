# SPDX-License-Identifier: Apache-2.0
"""Decodes photographs: only the window that is needed, resized to the size of the batch.

Windows are drawn for a whole batch at once. Then each image is decoded, in `tf.map_fn` or, as fast,
in a `tf.data` map over single images:

    windows = random_windows(shapes(encoded), random.stream("window"))
    flips = random.stream("move").uniform("flip") < 0.5
    image = decode_window(encoded[0], windows[0], flips[0], size=224)

Mirroring here costs nothing; later it would take another pass over the image.
"""

import math

import tensorflow as tf

from balpoe_jax.data.images.resize import resize
from balpoe_jax.data.randomness import RowRandom

_TRIES = 10
# Decodes as Pillow does, to the bit; TensorFlow's default is off by up to six levels.
_DCT = "INTEGER_ACCURATE"


def shapes(encoded: tf.Tensor) -> tf.Tensor:
    """Height and width of each encoded image, strings `[b]`, as int32 `[b, 2]`.

    Only the header of a JPEG is read.
    """
    return tf.map_fn(image_shape, encoded, fn_output_signature=tf.TensorSpec([2], tf.int32))


def image_shape(encoded: tf.Tensor) -> tf.Tensor:
    """Height and width of one encoded image, a scalar string, as int32 `[2]`."""
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.extract_jpeg_shape(encoded)[:2],
        lambda: tf.shape(_decode(encoded))[:2],
    )


def random_windows(
    shapes: tf.Tensor,
    random: RowRandom,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tf.Tensor:
    """Draws windows by the rule of torchvision's RandomResizedCrop (Inception's random crop).

    The share of the area is uniform within `scale`, the logarithm of width / height within that of
    `ratio`. The first of ten tries that fits is taken, at a uniform position. If none fits, it is
    the largest central window whose ratio is within `ratio`.

    Args:
        shapes: Height and width of each image, int32 `[b, 2]`, the rows of `random`.
        random: Source of the draws.
        scale: Least and greatest share of the area.
        ratio: Least and greatest ratio of width to height.

    Returns:
        int32 `[b, 4]`: top, left, height, width.
    """
    shapes = tf.cast(shapes, tf.float64)
    area = random.uniform("area", scale[0], scale[1], tf.float64, (_TRIES,))
    log_ratio = random.uniform(
        "ratio", math.log(ratio[0]), math.log(ratio[1]), tf.float64, (_TRIES,)
    )
    area *= tf.reduce_prod(shapes, axis=1, keepdims=True)
    spread = tf.exp(log_ratio)
    tries = tf.round(tf.sqrt(tf.stack([area / spread, area * spread], axis=-1)))
    fits = tf.reduce_all((tries > 0) & (tries <= shapes[:, None]), axis=-1)
    first = tf.argmax(tf.cast(fits, tf.int32), axis=1)
    drawn = tf.gather(tries, first, batch_dims=1)
    position = random.uniform("position", 0, 1, tf.float64, (2,))
    corner = tf.floor(position * (shapes - drawn + 1))
    window = tf.concat([corner, drawn], axis=1)
    any_fits = tf.reduce_any(fits, axis=1, keepdims=True)
    return tf.cast(tf.where(any_fits, window, _central_windows(shapes, ratio)), tf.int32)


def decode_window(encoded: tf.Tensor, window: tf.Tensor, flip: tf.Tensor, size: int) -> tf.Tensor:
    """Decodes a window of an image, resizes it and mirrors it if asked.

    Args:
        encoded: JPEG (also grey or CMYK), PNG, GIF or BMP, a scalar string.
        window: Top, left, height and width, int32 `[4]`.
        flip: Whether to mirror left and right, bool scalar.
        size: Side of the result.

    Returns:
        Packed `[size, size]`, see `packed_ops`.
    """
    image = _decode_window(encoded, window)
    return resize(image, (size, size), (size, size), flip=flip, packed=True)


def decode_central(encoded: tf.Tensor, resize_to: int = 256, size: int = 224) -> tf.Tensor:
    """The centre of an image, as torchvision's Resize and CenterCrop make it.

    The short side becomes `resize_to`, and the long side is rounded down. The corner of the crop is
    rounded, halves to even. Only the part of the image that the result depends on is decoded.

    Args:
        encoded: Image as in `decode_window`, a scalar string.
        resize_to: Length of the short side.
        size: Side of the result, at most `resize_to`.

    Returns:
        uint8 `[size, size, 3]`.
    """
    shape = image_shape(encoded)
    full = resize_to * shape // tf.reduce_min(shape)
    corner = tf.cast(tf.round((full - size) / 2), tf.int32)
    image = tf.cond(
        tf.reduce_all(full == shape),
        lambda: _decode_window(encoded, tf.concat([corner, [size, size]], axis=0)),
        lambda: _decode_and_resize(encoded, shape, full, corner, size),
    )
    return tf.ensure_shape(image, [size, size, 3])


def _decode_and_resize(
    encoded: tf.Tensor, shape: tf.Tensor, full: tf.Tensor, corner: tf.Tensor, size: int
) -> tf.Tensor:
    """The square of side `size` at `corner` of an image resized from `shape` to `full`."""
    step = shape / full
    # A pixel depends on the input within its own width, or within one pixel when enlarging.
    margin = tf.maximum(step, 1.0) + 1
    start = tf.cast(tf.maximum(tf.floor(tf.cast(corner, tf.float64) * step - margin), 0), tf.int32)
    stop = tf.cast(tf.math.ceil(tf.cast(corner + size, tf.float64) * step + margin), tf.int32)
    extent = tf.minimum(stop, shape) - start
    image = _decode_window(encoded, tf.concat([start, extent], axis=0))
    scaled = tf.cast(extent, tf.float64) / step
    offset = tf.cast(corner, tf.float64) - tf.cast(start, tf.float64) / step
    return resize(image, tf.unstack(scaled), (size, size), tf.unstack(offset))


def _central_windows(shapes: tf.Tensor, ratio: tuple[float, float]) -> tf.Tensor:
    """Largest central windows within `ratio`, float64 `[b, 4]`, of float64 `[b, 2]` shapes."""
    height, width = shapes[:, 0], shapes[:, 1]
    extent = tf.stack(
        [
            tf.where(width < ratio[0] * height, tf.round(width / ratio[0]), height),
            tf.where(width > ratio[1] * height, tf.round(height * ratio[1]), width),
        ],
        axis=1,
    )
    return tf.concat([tf.floor((shapes - extent) / 2), extent], axis=1)


def _decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a whole image, uint8 `[h, w, 3]`."""
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method=_DCT),
        lambda: _decode_other(encoded),
    )


def _decode_window(encoded: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
    """Decodes a window int32 `[4]` (top, left, height, width) of an image, uint8 `[h, w, 3]`."""
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: _decode_jpeg_window(encoded, window),
        lambda: _crop(_decode_other(encoded), window),
    )


def _decode_jpeg_window(encoded: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
    """Decodes with a margin, because a pixel's colour is interpolated from its neighbours."""
    corner, extent = window[:2], window[2:]
    start = tf.maximum(corner - 1, 0)
    stop = tf.minimum(corner + extent + 1, tf.io.extract_jpeg_shape(encoded)[:2])
    outer = tf.concat([start, stop - start], axis=0)
    image = tf.io.decode_and_crop_jpeg(encoded, outer, channels=3, dct_method=_DCT)
    return _crop(image, tf.concat([corner - start, extent], axis=0))


def _decode_other(encoded: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def _crop(image: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
    return tf.slice(image, [window[0], window[1], 0], [window[2], window[3], 3])
