# SPDX-License-Identifier: Apache-2.0
"""A view of images: one augmented version of each, from how they are stored to normalised floats.

Images in memory need `augment` alone. Photographs are decoded one by one in between:

    drawn = view.draw(shapes, random)
    images = [view.decode(encoded, row) for each row]
    images = view.augment(images, random)

A view may augment images in one of two ways, drawn for each.
"""

import dataclasses
from typing import Any

import tensorflow as tf

from balpoe_jax.data.images import decoding
from balpoe_jax.data.images.augment import augment_batch, change_image, draw_changes
from balpoe_jax.data.randomness import RowRandom
from balpoe_jax.data.records.sources import Source
from balpoe_jax.data.settings import AugmentSettings

# Of a photograph's window, as torchvision has it.
_LEAST_AREA = 0.08


class View:
    """How the images of a source are augmented, all in one way.

    Args:
        source: of the images.
        settings: what happens to them; photographs are cropped at random besides.
    """

    def __init__(self, source: Source, settings: AugmentSettings) -> None:
        self._settings = settings
        self._image_size = source.image_shape[0]
        # What is done to a batch, and before that to each photograph: to mirror while it is
        # resized, and to change it unless it is to be cropped or rotated before.
        self._of_batch, self._of_each = settings, AugmentSettings()
        if source.encoded:
            self._of_batch = dataclasses.replace(self._of_batch, flip=False, crop_area=None)
            if not self._of_batch.has_geometry:
                self._of_batch, self._of_each = self._of_batch.split_per_image_ops()

    def draw(self, shapes: tf.Tensor, random: RowRandom) -> dict[str, Any]:
        """What `decode` needs of each row of `random`.

        Args:
            shapes: height and width of the photographs, int32 `[rows, 2]`.
            random: source of the draws.
        """
        scale = (self._settings.crop_area or _LEAST_AREA, 1.0)
        flips = random.stream("move").uniform("flip") < (0.5 if self._settings.flip else 0)
        return {
            "windows": decoding.random_windows(shapes, random.stream("window"), scale),
            "flips": flips,
            "changes": draw_changes(random, self._of_each),
        }

    def decode(self, encoded: tf.Tensor, drawn: dict[str, Any]) -> tf.Tensor:
        """One photograph's window, resized and changed; packed `[H, W]`."""
        image = decoding.decode_window(encoded, drawn["windows"], drawn["flips"], self._image_size)
        return change_image(image, drawn["changes"], self._of_each)

    def augment(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
        """The rest: of uint8 or packed images of one size, in the form in which they came."""
        return augment_batch(images, random, self._of_batch)


class EitherView:
    """Of each image one of two views, with even odds; used as a `View` is.

    Args:
        source: of the images.
        first, second: what happens to an image in either case.
    """

    def __init__(self, source: Source, first: AugmentSettings, second: AugmentSettings) -> None:
        self._first, self._second = View(source, first), View(source, second)

    def draw(self, shapes: tf.Tensor, random: RowRandom) -> dict[str, Any]:
        """What `decode` needs of each row, of both views."""
        return {
            "first": self._first.draw(shapes, random),
            "second": self._second.draw(shapes, random.stream("second")),
            "takes_second": _takes_second(random),
        }

    def decode(self, encoded: tf.Tensor, drawn: dict[str, Any]) -> tf.Tensor:
        """One photograph by the view that was drawn for it; packed `[H, W]`."""
        return tf.cond(
            drawn["takes_second"],
            lambda: self._second.decode(encoded, drawn["second"]),
            lambda: self._first.decode(encoded, drawn["first"]),
        )

    def augment(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
        """The rest, each image by the view that was drawn for it."""
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
    """The view of some settings, or of either these or others."""
    return View(source, settings) if other is None else EitherView(source, settings, other)
