# SPDX-License-Identifier: Apache-2.0
"""The stages of making a training batch in a tf.data graph."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from balpoe_jax.data.batches.mixing import Mix, Mixer, mix_images
from balpoe_jax.data.images import decoding, packed_ops
from balpoe_jax.data.images.augment import normalize
from balpoe_jax.data.images.views import EitherView, View, make_view
from balpoe_jax.data.randomness import RowRandom, stream_seed
from balpoe_jax.data.records.readers import make_reader
from balpoe_jax.data.records.sources import Source
from balpoe_jax.data.settings import TrainSettings
from balpoe_jax.data.types import TrainBatch

Batch = dict[str, Any]  # of tensors

# Keys of the partners that a second sampler reads, and of their second view.
_OTHERS, _OTHERS_2 = "others", "others_2"


class TrainBatchMaker:
    """The stages of making a training batch, each a function inside the graph.

    Arrays in memory go through `indices`, `read` and `augment_and_mix`. Photographs also go through
    `draw` and `decode` after they are read.

    Args:
        source: The training set.
        settings: Settings of its batches.
        rows: Rows of each batch that this host makes.
    """

    def __init__(self, source: Source, settings: TrainSettings, rows: slice) -> None:
        self._reader = make_reader(source)
        self._settings = settings
        self._rows = rows
        self._image_size = source.image_shape[:2]
        # Each view with the stream of random numbers that it draws from.
        first = make_view(source, settings.augment, settings.other_augment)
        self._views: dict[str, tuple[str, View | EitherView]] = {"images": ("augment", first)}
        for number, augment in enumerate(settings.views, 2):
            self._views[f"images_{number}"] = f"augment_{number}", View(source, augment)
        self._mixer = None
        if settings.mix.alpha > 0:
            self._mixer = Mixer(
                settings.mix,
                source.labels,
                source.image_shape,
                settings.batch_size,
                settings.seed,
                rows,
            )
        if settings.mix.from_sampler:
            self._views[_OTHERS] = "augment_others", first
            if settings.mix.of_two_views and settings.views:
                second = View(source, settings.views[0])
                self._views[_OTHERS_2] = "augment_others_2", second

    def indices(self, step: tf.Tensor, indices: tf.Tensor) -> Batch:
        """Positions in the training set of this host's rows, int32 `[rows]`."""
        batch = {"step": step, "indices": indices[self._rows]}
        if _OTHERS in self._views:
            assert self._mixer is not None
            batch["other_indices"] = self._mixer.partners_to_read(step)
        return batch

    def read(self, batch: Batch) -> Batch:
        """Reads labels, and images as they are stored."""
        images, labels = self._reader.read(batch["indices"])
        read = {"step": tf.fill(tf.shape(labels), batch["step"]), "labels": labels}
        stored = {"images": images}
        if _OTHERS in self._views:
            stored[_OTHERS], read["read_labels"] = self._reader.read(batch["other_indices"])
        return {**read, "stored": stored}

    def draw(self, batch: Batch) -> Batch:
        """Adds the draws that `decode` needs."""
        shapes = {name: decoding.shapes(encoded) for name, encoded in batch["stored"].items()}
        drawn = {
            name: view.draw(_stored(shapes, name), self._random(batch, stream))
            for name, (stream, view) in self._views.items()
        }
        return {**batch, "drawn": drawn}

    def decode(self, row: Batch) -> Batch:
        """Decodes a window of one photograph for each view; packed."""
        stored, drawn = row.pop("stored"), row.pop("drawn")

        def decode(name: str, view: View | EitherView) -> tf.Tensor:
            return self._if_needed(
                name,
                row["step"],
                lambda: view.decode(_stored(stored, name), drawn[name]),
                lambda: tf.zeros(self._image_size, tf.uint32),
            )

        images = {name: decode(name, view) for name, (_, view) in self._views.items()}
        return {**row, "stored": images}

    def augment_and_mix(self, batch: Batch) -> TrainBatch:
        """Augments, normalises and mixes the images of a batch."""
        labels = batch["labels"]

        def augment(name: str, stream: str, view: View | EitherView) -> tf.Tensor:
            images = _stored(batch["stored"], name)
            return self._if_needed(
                name,
                batch["step"][0],
                lambda: view.augment(images, self._random(batch, stream)),
                lambda: tf.zeros_like(images),
            )

        images = {name: augment(name, *how) for name, how in self._views.items()}
        mix, other_labels, weight = None, labels, tf.ones_like(labels, tf.float32)
        if self._mixer is not None:
            mix, (other_labels, weight) = self._mixer.draw(
                batch["step"][0], labels, batch.get("read_labels")
            )
        others = [images.pop(name, None) for name in (_OTHERS, _OTHERS_2)]
        how = self._settings.mean, self._settings.std, self._settings.dtype
        views = []
        for number, view in enumerate(images.values()):
            mix_of_view = None if mix is None else mix.of_view(number)
            partners = None if mix_of_view is None else others[number]
            views.append(to_input(view, *how, partners, mix_of_view))
        made = TrainBatch(tuple(views), labels, other_labels, weight)
        if self._settings.mix.rows_per_image == 1:
            return made
        return with_clean_rows(made, to_input(images["images"], *how))

    def _if_needed(
        self,
        name: str,
        step: tf.Tensor,
        make: Callable[[], tf.Tensor],
        blank: Callable[[], tf.Tensor],
    ) -> tf.Tensor:
        """Makes a view; a blank one in place of partners where the batch is not mixed."""
        if name not in (_OTHERS, _OTHERS_2) or self._settings.mix.always:
            return make()
        assert self._mixer is not None
        return tf.cond(self._mixer.mixes(step), make, blank)

    def _random(self, batch: Batch, stream: str) -> RowRandom:
        seed = stream_seed(self._settings.seed, stream, batch["step"][0])
        return RowRandom(seed, self._settings.batch_size, self._rows)


def with_clean_rows(batch: TrainBatch, clean: tf.Tensor) -> TrainBatch:
    """RegMixup's batch of `2 * rows`: of each image the clean row and then the mixed one.

    Args:
        batch: Mixed batch.
        clean: First view before it was mixed, as the network gets it.
    """

    def pair(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.stack([first, second], axis=1), [-1, *first.shape[1:]])

    mixed, *further = batch.views
    return TrainBatch(
        views=(pair(clean, mixed), *(pair(view, view) for view in further)),
        labels=pair(batch.labels, batch.labels),
        other_labels=pair(batch.labels, batch.other_labels),
        mix_weight=pair(tf.ones_like(batch.mix_weight), batch.mix_weight),
    )


def to_input(
    images: tf.Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: str,
    others: tf.Tensor | None = None,
    mix: Mix | None = None,
) -> tf.Tensor:
    """The network's input, of type `dtype` `[rows, H, W, 3]`.

    Args:
        images: Augmented images, uint8 `[rows, H, W, 3]` or packed `[rows, H, W]`.
        mean, std: Statistics by channel, see `normalize`.
        dtype: Type to which the images are rounded at the end.
        others: Partners in the same form; None if they are among the images.
        mix: How images and partners are mixed; None for no mixing.
    """

    def convert(images: tf.Tensor, others: tf.Tensor | None, mix: Mix | None) -> tf.Tensor:
        images = normalize(images, mean, std)
        if mix is not None:
            others = None if others is None else normalize(others, mean, std)
            images = mix_images(images, others, mix)
        return tf.cast(images, dtype)

    # A batch of photographs exceeds every cache; compiled, all of this is one pass over it.
    packed = images.dtype == tf.uint32
    return (packed_ops.compiled(convert) if packed else convert)(images, others, mix)


def _stored(stored: dict[str, tf.Tensor], name: str) -> tf.Tensor:
    """The images of a view; before decoding, views of the same images share one entry."""
    return stored.get(name, stored[_OTHERS if name == _OTHERS_2 else "images"])
