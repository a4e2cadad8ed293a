# SPDX-License-Identifier: Apache-2.0
"""The augmentation of a training batch, in the reference's order."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from balpoe_jax.data import image_ops, pixels, randaugment
from balpoe_jax.data.blur import blur, box_weights
from balpoe_jax.data.jitter import color_jitter, draw_jitter
from balpoe_jax.data.photos import random_windows
from balpoe_jax.data.policies import apply_policy, check_policy
from balpoe_jax.data.randaugment import IMAGENET_MEAN
from balpoe_jax.data.randomness import RowRandom
from balpoe_jax.data.resampling import enlarge_windows
from balpoe_jax.errors import UserError

BLUR_SIGMA = (0.1, 2.0)


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
    """What happens to each image, in this order.

    Attributes:
        crop_area: a window with at least this share of the area is resized to the image's size, by
            the rule of torchvision's RandomResizedCrop. 0: photographs, which always have such a
            window, 0.08; of images of one size the whole is kept.
        crop_padding: pixels of black around the image, of which a crop of the old size is taken.
        flip: mirror left and right, half of the images.
        rotation: uniform between minus and plus so many degrees; nearest pixel, black corners.
        color_jitter: brightness, contrast and saturation each change by a factor that is uniform
            within 1 plus or minus so much, in random order.
        hue: it turns by a share of the circle that is uniform between minus and plus so much; one
            more of these changes in random order.
        jitter_probability: of all of these changes together.
        grayscale: the share of images that lose their colour.
        blur: the share of images that are blurred, by a Gaussian of a standard deviation that is
            uniform in `BLUR_SIGMA` pixels; see `blur`.
        policy: one of `policies.POLICIES`.
        fill: colour that the policy randaugment shows outside the image, 0 to 255 by channel.
        randaugment_layers, randaugment_magnitude: of that policy, see `randaugment.draw`.
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
    crop_area: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 1.0
    grayscale: float = 0.0
    blur: float = 0.0
    randaugment_layers: int = randaugment.LAYERS
    randaugment_magnitude: float = randaugment.MAGNITUDE

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
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"augment.hue must be 0 to 0.5 of the circle, got {self.hue}.")
        for name in ("crop_area", "jitter_probability", "grayscale", "blur"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise UserError(f"augment.{name} must be 0 to 1, got {share}.")
        if len(self.fill) != 3 or not all(0 <= x <= 255 for x in self.fill):
            raise UserError(f"augment.fill must be three values from 0 to 255, got {self.fill}.")
        if self.randaugment_layers < 1:
            raise UserError(
                f"augment.randaugment_layers must be at least 1, got {self.randaugment_layers}; "
                "augment.policy=none turns RandAugment off."
            )
        if not 0 <= self.randaugment_magnitude <= randaugment.GREATEST:
            raise UserError(
                f"augment.randaugment_magnitude must be 0 to {randaugment.GREATEST:g}, got "
                f"{self.randaugment_magnitude}."
            )
        if self.cutout < 0 or self.cutout % 2:
            raise UserError(f"augment.cutout must be even and not negative, got {self.cutout}.")

    @property
    def moves(self) -> bool:
        """Whether images are cropped, mirrored or rotated."""
        return bool(self.crop_area or self.crop_padding or self.flip or self.rotation)

    @property
    def jitters(self) -> bool:
        """Whether colours are changed at random."""
        return any(self.color_jitter) or self.hue > 0

    @property
    def changes(self) -> bool:
        """Whether there is anything for `change_image` to do."""
        gray_or_blurred = self.grayscale > 0 or self.blur > 0
        return self.jitters or gray_or_blurred or self.policy == "randaugment"

    def without_changes(self) -> tuple["AugmentSettings", "AugmentSettings"]:
        """These settings without what `change_image` does, and those of that alone."""
        none = AugmentSettings()
        changes = ("color_jitter", "hue", "jitter_probability", "grayscale", "blur")
        rest = dataclasses.replace(self, **{name: getattr(none, name) for name in changes})
        only = dataclasses.replace(none, **{name: getattr(self, name) for name in changes})
        if self.policy == "randaugment":
            rest = dataclasses.replace(rest, policy=none.policy)
            its_own = ("policy", "fill", "randaugment_layers", "randaugment_magnitude")
            only = dataclasses.replace(only, **{name: getattr(self, name) for name in its_own})
        return rest, only


def augment_batch(images: tf.Tensor, random: RowRandom, settings: AugmentSettings) -> tf.Tensor:
    """Augments each image by draws of its own.

    Args:
        images: uint8 `[rows, H, W, 3]`, or packed (see `pixels`) `[rows, H, W]`; the rows of
            `random`.
        random: source of the draws; the same source gives the same images.
        settings: what to do.

    Returns:
        Images in the form in which they came.
    """
    packed = images.dtype == tf.uint32
    if settings.moves:
        images = _move(_as_bytes(images), random.stream("move"), settings)
    if settings.changes:
        images = _as_pixels(images)
        # One by one they stay in the cache.
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
    if settings.jitters:
        draws["jitter"] = draw_jitter(
            random.stream("color_jitter"), settings.color_jitter, settings.hue
        )
    # A probability of 1 draws nothing for it.
    if settings.jitters and settings.jitter_probability < 1:
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
    """Changes of colour, blur and RandAugment: what is done image by image.

    Args:
        image: packed `[H, W]`, see `pixels`.
        drawn: a row of `draw_changes`.
        settings: for which they were drawn.

    Returns:
        Packed `[H, W]`.
    """
    if "jitter" in drawn:
        image = _where(
            drawn.get("jittered"), lambda image: color_jitter(image, *drawn["jitter"]), image
        )
    if "grayscale" in drawn:
        image = _where(drawn["grayscale"], lambda image: pixels.color(image, 0.0), image)
    if "blur" in drawn:
        image = _where(drawn["blurred"], lambda image: blur(image, drawn["blur"]), image)
    if "policy" in drawn:
        image = randaugment.apply(image, drawn["policy"], settings.fill)
    return image


def normalize(images: tf.Tensor, mean: Sequence[float], std: Sequence[float]) -> tf.Tensor:
    """`(x / 255 - mean) / std` as float32 `[..., H, W, 3]`.

    Args:
        images: uint8 `[..., H, W, 3]`, or packed (see `pixels`) `[..., H, W]`. The latter is fast
            within a function that XLA compiles.
        mean, std: by channel.
    """
    scale = 1 / (255 * np.asarray(std, np.float64))
    offset = -np.divide(mean, std, dtype=np.float64)
    if images.dtype == tf.uint32:
        return pixels.to_float(images) * scale.astype(np.float32) + offset.astype(np.float32)
    # By whole rows: operations that broadcast along three channels are several times slower.
    width = images.shape[-2]
    rows = tf.reshape(tf.cast(images, tf.float32), [-1, width * 3])
    rows = rows * np.tile(scale, width).astype(np.float32)
    rows += np.tile(offset, width).astype(np.float32)
    return tf.reshape(rows, tf.shape(images))


def _as_bytes(images: tf.Tensor) -> tf.Tensor:
    return pixels.unpack(images) if images.dtype == tf.uint32 else images


def _as_pixels(images: tf.Tensor) -> tf.Tensor:
    return images if images.dtype == tf.uint32 else pixels.pack(images)


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
    return image_ops.crop_flip_rotate(images, top, left, flip, degrees, padding)


def _where(
    condition: tf.Tensor | None, change: Callable[[tf.Tensor], tf.Tensor], image: tf.Tensor
) -> tf.Tensor:
    """The changed image if the condition, a bool scalar, holds or there is none."""
    if condition is None:
        return change(image)
    return tf.cond(condition, lambda: change(image), lambda: image)


def _cut_out(images: tf.Tensor, random: RowRandom, size: int) -> tf.Tensor:
    _, height, width, _ = images.shape
    top = random.uniform("top", 0, height, tf.int32)
    left = random.uniform("left", 0, width, tf.int32)
    return image_ops.cutout(images, top, left, size)
