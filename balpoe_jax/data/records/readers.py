# SPDX-License-Identifier: Apache-2.0
"""Reading the examples of a source inside a tf.data graph."""

import dataclasses

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from balpoe_jax.data.records.sources import ArraySource, RecordSource, Source


@dataclasses.dataclass(frozen=True)
class ArrayReader:
    """Reads batches of an `ArraySource` inside a graph."""

    images: tf.Tensor
    labels: tf.Tensor

    def read(self, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """int `[B]` -> images uint8 `[B, H, W, 3]` and labels int32 `[B]`."""
        return tf.gather(self.images, indices), tf.gather(self.labels, indices)


class RecordReader:
    """Reads batches of a `RecordSource` inside a graph."""

    def __init__(self, source: RecordSource) -> None:
        self._source = source
        self._labels = tf.constant(source.labels, tf.int32)
        source.make_room()

    def read(self, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """int `[B]` -> encoded images string `[B]` and labels int32 `[B]`."""
        encoded = tf.numpy_function(self._read, [indices], tf.string, stateful=False)
        return tf.ensure_shape(encoded, indices.shape), tf.gather(self._labels, indices)

    def _read(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.object_]:
        return np.array([self._source.read_image(i) for i in indices], dtype=object)


def make_reader(source: Source) -> ArrayReader | RecordReader:
    """The reader of a source; makes arrays constants of the graph.

    Raises:
        UserError (a `ValueError`): the system lets this process open too few files.
    """
    if isinstance(source, ArraySource):
        return ArrayReader(tf.constant(source.images), tf.constant(source.labels, tf.int32))
    return RecordReader(source)
