# SPDX-License-Identifier: Apache-2.0
"""Reading the examples of a source inside a tf.data graph."""

import dataclasses

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from balpoe_jax.data.records.sources import ArraySource, SmallSource, Source, StoredSource


@dataclasses.dataclass(frozen=True)
class ArrayReader:
    """Reads batches of an `ArraySource` inside a graph."""

    images: tf.Tensor
    labels: tf.Tensor

    def read(self, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """int `[B]` -> images uint8 `[B, H, W, 3]` and labels int32 `[B]`."""
        return tf.gather(self.images, indices), tf.gather(self.labels, indices)


class StoredReader:
    """Reads batches of encoded photographs inside a graph."""

    def __init__(self, source: StoredSource) -> None:
        self._source = source
        self._labels = tf.constant(source.labels, tf.int32)
        source.make_room()

    def read(self, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """int `[B]` -> encoded images string `[B]` and labels int32 `[B]`."""
        encoded = tf.numpy_function(self._read, [indices], tf.string, stateful=False)
        return tf.ensure_shape(encoded, indices.shape), tf.gather(self._labels, indices)

    def _read(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.object_]:
        return np.array([self._source.read_image(i) for i in indices], dtype=object)


class PixelReader:
    """Reads batches of small images as pixels inside a graph."""

    def __init__(self, source: SmallSource) -> None:
        self._source = source
        self._labels = tf.constant(source.labels, tf.int32)
        source.make_room()

    def read(self, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """int `[B]` -> images uint8 `[B, H, W, 3]` and labels int32 `[B]`."""
        images = tf.numpy_function(self._read, [indices], tf.uint8, stateful=False)
        images = tf.ensure_shape(images, [*indices.shape, *self._source.image_shape])
        return images, tf.gather(self._labels, indices)

    def _read(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        return np.stack([self._source.read_pixels(i) for i in indices])


def make_reader(source: Source) -> ArrayReader | PixelReader | StoredReader:
    """The reader of a source; makes arrays constants of the graph.

    Raises:
        UserError (a `ValueError`): the system lets this process open too few files.
    """
    if isinstance(source, ArraySource):
        return ArrayReader(tf.constant(source.images), tf.constant(source.labels, tf.int32))
    return PixelReader(source) if isinstance(source, SmallSource) else StoredReader(source)
