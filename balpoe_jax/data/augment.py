# SPDX-License-Identifier: Apache-2.0
"""The augmentation of a training batch, in the reference's order."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from balpoe_jax.data import image_ops
from balpoe_jax.data.policies import apply_policy, check_policy
from balpoe_jax.data.randaugment import IMAGENET_MEAN
from balpoe_jax.data.randomness import RowRandom
from balpoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
    """What happens to each image, in this order.

    Attributes:
        crop_padding: pixels of black around the image, of which a crop of the old size is taken.
        flip: mirror left and right, half of the images.
        rotation: uniform between minus and plus so many degrees; nearest pixel, black corners.
        color_jitter: brightness, contrast and saturation each change by a factor that is uniform
            within 1 plus or minus so much, in random order.
        policy: one of `policies.POLICIES`.
        fill: colour that the policy randaugment shows outside the image, 0 to 255 by channel.
        cutout: side in pixels of a black square with its centre anywhere; 0 for none.

    Raises:
        UserError (a `ValueError`): a value that is not valid.
    """

    crop_padding: int = 0
    flip: bool = False
    rotation: float = 0.0
    color_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    policy: str = "none"
    fill: tuple[int, int, int] = IMAGENET_MEAN
    cutout: int = 0

    def __post_init__(self) -> None:
        check_policy(self.policy)
        if not 0 <= self.rotation <= 180:
            raise UserError(f"augment.rotation must be 0 to 180 degrees, got {self.rotation}.")
        if self.crop_padding < 0:
            raise UserError(f"augment.crop_padding must not be negative, got {self.crop_padding}.")
        if len(self.color_jitter) != 3 or not all(0 <= x <= 1 for x in self.color_jitter):
            raise UserError(
                "augment.color_jitter must be three numbers from 0 to 1 (brightness, contrast, "
                f"saturation), got {self.color_jitter}."
            )
        if len(self.fill) != 3 or not all(0 <= x <= 255 for x in self.fill):
            raise UserError(f"augment.fill must be three values from 0 to 255, got {self.fill}.")
        if self.cutout < 0 or self.cutout % 2:
            raise UserError(f"augment.cutout must be even and not negative, got {self.cutout}.")


def augment_batch(images: tf.Tensor, random: RowRandom, settings: AugmentSettings) -> tf.Tensor:
    """Augments each image by draws of its own.

    Args:
        images: uint8 `[rows, H, W, 3]`, the rows of `random`.
        random: source of the draws; the same source gives the same images.
        settings: what to do.

    Returns:
        uint8 `[rows, H, W, 3]`.
    """
    images = _move(images, random.stream("move"), settings)
    images = _jitter(images, random.stream("color_jitter"), settings.color_jitter)
    images = apply_policy(images, random.stream("policy"), settings.policy, settings.fill)
    if settings.cutout:
        _, height, width, _ = images.shape
        draws = random.stream("cutout")
        top = draws.uniform("top", 0, height, tf.int32)
        left = draws.uniform("left", 0, width, tf.int32)
        images = image_ops.cutout(images, top, left, settings.cutout)
    return images


def normalize(images: tf.Tensor, mean: Sequence[float], std: Sequence[float]) -> tf.Tensor:
    """`(images / 255 - mean) / std` as float32, `mean` and `std` by channel."""
    width = images.shape[-2]
    scale = np.tile(1 / (255 * np.asarray(std, np.float64)), width)
    offset = np.tile(-np.divide(mean, std, dtype=np.float64), width)
    # By whole rows: operations that broadcast along three channels are several times slower.
    rows = tf.reshape(tf.cast(images, tf.float32), [-1, width * 3])
    rows = rows * tf.constant(scale, tf.float32) + tf.constant(offset, tf.float32)
    return tf.reshape(rows, tf.shape(images))


def _move(images: tf.Tensor, random: RowRandom, settings: AugmentSettings) -> tf.Tensor:
    """Crop, flip and rotation."""
    padding = settings.crop_padding
    if not (padding or settings.flip or settings.rotation):
        return images
    top = random.uniform("top", 0, 2 * padding + 1, tf.int32)
    left = random.uniform("left", 0, 2 * padding + 1, tf.int32)
    flip = random.uniform("flip") < (0.5 if settings.flip else 0.0)
    degrees = None
    if settings.rotation:
        degrees = random.uniform("degrees", -settings.rotation, settings.rotation, tf.float64)
    return image_ops.crop_flip_rotate(images, top, left, flip, degrees, padding)


def _jitter(
    images: tf.Tensor, random: RowRandom, strengths: tuple[float, float, float]
) -> tf.Tensor:
    """Brightness, contrast and saturation in random order, as torchvision's ColorJitter."""
    if not any(strengths):
        return images
    deviation = random.uniform("factors", -1, 1, per_row=(3,))
    factors = 1 + deviation * tf.constant(strengths, tf.float32)
    order = tf.argsort(random.uniform("order", per_row=(3,)), axis=1)
    return image_ops.color_jitter(images, factors, order)
