# SPDX-License-Identifier: Apache-2.0
"""The augmentation of a training batch, in the reference's order."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from balpoe_jax.data.images import batch_ops, packed_ops, randaugment
from balpoe_jax.data.images.autoaugment import apply_policy
from balpoe_jax.data.images.blur import blur, box_weights
from balpoe_jax.data.images.color_jitter import color_jitter, draw_jitter
from balpoe_jax.data.images.decoding import random_windows
from balpoe_jax.data.images.resize import enlarge_windows
from balpoe_jax.data.randomness import RowRandom
from balpoe_jax.data.settings import BLUR_SIGMA, AugmentSettings


def augment_batch(images: tf.Tensor, random: RowRandom, settings: AugmentSettings) -> tf.Tensor:
    """Augments each image with its own draws.

    Args:
        images: uint8 `[rows, H, W, 3]`, or packed (see `packed_ops`) `[rows, H, W]`; the rows of
            `random`.
        random: Source of the draws; the same source gives the same images.
        settings: Settings of the augmentation.

    Returns:
        Images in the form of the input.
    """
    packed = images.dtype == tf.uint32
    if settings.has_geometry:
        images = _move(_as_bytes(images), random.stream("move"), settings)
    if settings.has_per_image_ops:
        images = _as_pixels(images)
        # One image at a time stays in the cache.
        images = tf.map_fn(
            lambda one: change_image(one[0], one[1], settings),
            (images, draw_changes(random, settings)),
            fn_output_signature=tf.TensorSpec(images.shape[1:], tf.uint32),
        )
    if settings.policy not in ("none", "randaugment"):
        images = apply_policy(_as_bytes(images), random.stream("policy"), settings.policy)
    if settings.cutout:
        images = _cut_out(_as_bytes(images), random.stream("cutout"), settings.cutout)
    return _as_pixels(images) if packed else _as_bytes(images)


Changes = dict[str, Any]


def draw_changes(random: RowRandom, settings: AugmentSettings) -> Changes:
    """Draws what `change_image` does to each row of `random`."""
    draws: Changes = {}
    if settings.has_color_jitter:
        draws["jitter"] = draw_jitter(
            random.stream("color_jitter"), settings.color_jitter, settings.hue
        )
    # A probability of 1 draws nothing for it.
    if settings.has_color_jitter and settings.jitter_probability < 1:
        draws["jittered"] = random.uniform("jittered") < settings.jitter_probability
    if settings.grayscale:
        draws["grayscale"] = random.uniform("grayscale") < settings.grayscale
    if settings.blur:
        draws["blurred"] = random.uniform("blurred") < settings.blur
        draws["blur"] = box_weights(random.uniform("blur", *BLUR_SIGMA))
    if settings.policy == "randaugment":
        draws["policy"] = randaugment.draw(
            random.stream("policy"), settings.randaugment_layers, settings.randaugment_magnitude
        )
    return draws


def change_image(image: tf.Tensor, drawn: Changes, settings: AugmentSettings) -> tf.Tensor:
    """Applies the operations that work image by image: colour, blur and RandAugment.

    Args:
        image: Packed `[H, W]`, see `packed_ops`.
        drawn: Row of what `draw_changes` drew.
        settings: Settings that it was drawn for.

    Returns:
        Packed `[H, W]`.
    """
    if "jitter" in drawn:
        image = _where(
            drawn.get("jittered"), lambda image: color_jitter(image, *drawn["jitter"]), image
        )
    if "grayscale" in drawn:
        image = _where(drawn["grayscale"], lambda image: packed_ops.color(image, 0.0), image)
    if "blur" in drawn:
        image = _where(drawn["blurred"], lambda image: blur(image, drawn["blur"]), image)
    if "policy" in drawn:
        image = randaugment.apply(image, drawn["policy"], settings.fill)
    return image


def normalize(images: tf.Tensor, mean: Sequence[float], std: Sequence[float]) -> tf.Tensor:
    """`(x / 255 - mean) / std` as float32 `[..., H, W, 3]`.

    Args:
        images: uint8 `[..., H, W, 3]`, or packed (see `packed_ops`) `[..., H, W]`. The latter is
            fast within a function that XLA compiles.
        mean, std: Statistics by channel, for images in [0, 1].
    """
    scale = 1 / (255 * np.asarray(std, np.float64))
    offset = -np.divide(mean, std, dtype=np.float64)
    if images.dtype == tf.uint32:
        return packed_ops.to_float(images) * scale.astype(np.float32) + offset.astype(np.float32)
    # By whole rows: operations that broadcast along three channels are several times slower.
    width = images.shape[-2]
    rows = tf.reshape(tf.cast(images, tf.float32), [-1, width * 3])
    rows = rows * np.tile(scale, width).astype(np.float32)
    rows += np.tile(offset, width).astype(np.float32)
    return tf.reshape(rows, tf.shape(images))


def _as_bytes(images: tf.Tensor) -> tf.Tensor:
    return packed_ops.unpack(images) if images.dtype == tf.uint32 else images


def _as_pixels(images: tf.Tensor) -> tf.Tensor:
    return images if images.dtype == tf.uint32 else packed_ops.pack(images)


def _move(images: tf.Tensor, random: RowRandom, settings: AugmentSettings) -> tf.Tensor:
    """Crops, flip and rotation."""
    if settings.crop_area:
        _, height, width, _ = images.shape
        shapes = tf.tile([[height, width]], [tf.shape(images)[0], 1])
        windows = random_windows(shapes, random.stream("window"), (settings.crop_area, 1.0))
        images = enlarge_windows(images, windows)
    padding = settings.crop_padding
    top = random.uniform("top", 0, 2 * padding + 1, tf.int32)
    left = random.uniform("left", 0, 2 * padding + 1, tf.int32)
    flip = random.uniform("flip") < (0.5 if settings.flip else 0.0)
    degrees = None
    if settings.rotation:
        degrees = random.uniform("degrees", -settings.rotation, settings.rotation, tf.float64)
    return batch_ops.crop_flip_rotate(images, top, left, flip, degrees, padding)


def _where(
    condition: tf.Tensor | None, change: Callable[[tf.Tensor], tf.Tensor], image: tf.Tensor
) -> tf.Tensor:
    """The changed image if the condition, a bool scalar, holds or is None."""
    if condition is None:
        return change(image)
    return tf.cond(condition, lambda: change(image), lambda: image)


def _cut_out(images: tf.Tensor, random: RowRandom, size: int) -> tf.Tensor:
    _, height, width, _ = images.shape
    top = random.uniform("top", 0, height, tf.int32)
    left = random.uniform("left", 0, width, tf.int32)
    return batch_ops.cutout(images, top, left, size)
