# SPDX-License-Identifier: Apache-2.0
"""A view of images: one augmented version of each, from stored images to augmented pixels.

Images in memory need only `augment`. Photographs are first decoded, one by one:

    drawn = view.draw(shapes, random)
    images = [view.decode(encoded, row) for each row]
    images = view.augment(images, random)

`EitherView` augments each image in one of two ways, which is drawn for it.
"""

import dataclasses
from typing import Any

import tensorflow as tf

from balpoe_jax.data.images import decoding
from balpoe_jax.data.images.augment import augment_batch, change_image, draw_changes
from balpoe_jax.data.randomness import RowRandom
from balpoe_jax.data.records.sources import Source
from balpoe_jax.data.settings import AugmentSettings

# Least share of the area of a photograph's window, torchvision's default.
_LEAST_AREA = 0.08


class View:
    """A view that augments all images of a source in the same way.

    Args:
        source: Source of the images.
        settings: Augmentation; photographs also get a random window.
    """

    def __init__(self, source: Source, settings: AugmentSettings) -> None:
        self._settings = settings
        self._image_size = source.image_shape[0]
        # The augmentation of a batch, and what is done before to each photograph: it is mirrored
        # while it is resized, and its colours change then, too, unless a crop or rotation follows.
        self._of_batch, self._of_each = settings, AugmentSettings()
        if source.encoded:
            self._of_batch = dataclasses.replace(self._of_batch, flip=False, crop_area=None)
            if not self._of_batch.has_geometry:
                self._of_batch, self._of_each = self._of_batch.split_per_image_ops()

    def draw(self, shapes: tf.Tensor, random: RowRandom) -> dict[str, Any]:
        """Draws what `decode` needs for each row of `random`.

        Args:
            shapes: Height and width of the photographs, int32 `[rows, 2]`.
            random: Source of the draws.
        """
        scale = (self._settings.crop_area or _LEAST_AREA, 1.0)
        flips = random.stream("move").uniform("flip") < (0.5 if self._settings.flip else 0)
        return {
            "windows": decoding.random_windows(shapes, random.stream("window"), scale),
            "flips": flips,
            "changes": draw_changes(random, self._of_each),
        }

    def decode(self, encoded: tf.Tensor, drawn: dict[str, Any]) -> tf.Tensor:
        """Decodes one photograph's window, resizes and changes it; packed `[H, W]`."""
        image = decoding.decode_window(encoded, drawn["windows"], drawn["flips"], self._image_size)
        return change_image(image, drawn["changes"], self._of_each)

    def augment(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
        """Applies the rest to uint8 or packed images of one size; keeps their form."""
        return augment_batch(images, random, self._of_batch)


class EitherView:
    """One of two views of each image, with even odds; used like a `View`.

    Args:
        source: Source of the images.
        first, second: Augmentations of the two views.
    """

    def __init__(self, source: Source, first: AugmentSettings, second: AugmentSettings) -> None:
        self._first, self._second = View(source, first), View(source, second)

    def draw(self, shapes: tf.Tensor, random: RowRandom) -> dict[str, Any]:
        """Draws what `decode` needs for each row, for both views."""
        return {
            "first": self._first.draw(shapes, random),
            "second": self._second.draw(shapes, random.stream("second")),
            "takes_second": _takes_second(random),
        }

    def decode(self, encoded: tf.Tensor, drawn: dict[str, Any]) -> tf.Tensor:
        """Decodes one photograph by the view that was drawn for it; packed `[H, W]`."""
        return tf.cond(
            drawn["takes_second"],
            lambda: self._second.decode(encoded, drawn["second"]),
            lambda: self._first.decode(encoded, drawn["first"]),
        )

    def augment(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
        """Applies the rest to each image by the view that was drawn for it."""
        takes_second = _takes_second(random)
        first = self._first.augment(images, random)
        second = self._second.augment(images, random.stream("second"))
        shape = [-1, *[1] * (len(images.shape) - 1)]
        return tf.where(tf.reshape(takes_second, shape), second, first)


def _takes_second(random: RowRandom) -> tf.Tensor:
    return random.uniform("takes second") < 0.5


def make_view(
    source: Source, settings: AugmentSettings, other: AugmentSettings | None = None
) -> View | EitherView:
    """The view of these settings, or an `EitherView` of these and the others."""
    return View(source, settings) if other is None else EitherView(source, settings, other)
