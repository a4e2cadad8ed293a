# SPDX-License-Identifier: Apache-2.0
"""Random access to the examples of a split.

A source has `labels` int64 `[N]`, says with `encoded` whether its images are files to be decoded
and with `image_shape` what becomes of them, and reads those of given positions inside a tf.data
graph.
"""

import dataclasses
import os
import weakref
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from balpoe_jax.data.tfrecords import RecordIndex
from balpoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Decoded images of one size, in memory.

    Attributes:
        images: uint8 `[N, H, W, 3]`.
        labels: int64 `[N]`.
        keys: int64 `[N]`, positions in the original data set.
    """

    encoded: ClassVar[bool] = False
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.labels) == len(self.keys) or not len(self.labels):
            raise UserError(
                "A source needs as many images as labels and keys, at least one, "
                f"got {len(self.images)}, {len(self.labels)} and {len(self.keys)}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, 3)`."""
        return self.images.shape[1:]

    def select(self, indices: npt.NDArray[np.int64]) -> "ArraySource":
        """The examples at `indices`, in that order."""
        return ArraySource(self.images[indices], self.labels[indices], self.keys[indices])

    def reader(self) -> "ArrayReader":
        """Puts the arrays where a graph can read them."""
        return ArrayReader(tf.constant(self.images), tf.constant(self.labels, tf.int32))


@dataclasses.dataclass(frozen=True)
class ArrayReader:
    """Reads batches of an `ArraySource` inside a graph."""

    images: tf.Tensor
    labels: tf.Tensor

    def read(self, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """int `[B]` -> images uint8 `[B, H, W, 3]` and labels int32 `[B]`."""
        return tf.gather(self.images, indices), tf.gather(self.labels, indices)


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Encoded photographs in TFRecord files, read one by one.

    Attributes:
        paths: the files.
        index: where in them the images are.
        image_size: height and width in pixels that images are brought to.
        resize: short side in pixels to which an image is scaled for a central crop, in testing.
    """

    encoded: ClassVar[bool] = True
    paths: tuple[str, ...]
    index: RecordIndex
    image_size: int
    resize: int

    def __post_init__(self) -> None:
        if not len(self.index.labels):
            raise UserError(f"There is no example in {', '.join(self.paths) or 'no file'}.")
        if not 1 <= self.image_size <= self.resize:
            raise UserError(
                "Expected an image size of at least 1 pixel and a resized short side of at least "
                f"that, got {self.image_size} and {self.resize}."
            )

    def __len__(self) -> int:
        return len(self.index.labels)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 `[N]`."""
        return self.index.labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, 3)` after decoding."""
        return self.image_size, self.image_size, 3

    def select(self, indices: npt.NDArray[np.int64]) -> "RecordSource":
        """The examples at `indices`, in that order."""
        return dataclasses.replace(self, index=self.index.select(indices))

    def reader(self) -> "RecordReader":
        """Opens the files for a graph to read."""
        return RecordReader(self.paths, self.index)


class RecordReader:
    """Reads batches of a `RecordSource` inside a graph; closes its files when it is collected."""

    def __init__(self, paths: tuple[str, ...], index: RecordIndex) -> None:
        self._index = index
        self._files = [os.open(path, os.O_RDONLY) for path in paths]
        self._labels = tf.constant(index.labels, tf.int32)
        weakref.finalize(self, _close, self._files)

    def read(self, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """int `[B]` -> encoded images string `[B]` and labels int32 `[B]`."""
        encoded = tf.numpy_function(self._read, [indices], tf.string, stateful=False)
        return tf.ensure_shape(encoded, indices.shape), tf.gather(self._labels, indices)

    def _read(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.object_]:
        index = self._index
        return np.array(
            [
                os.pread(self._files[index.files[i]], index.sizes[i], index.offsets[i])
                for i in indices
            ],
            dtype=object,
        )


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


Source = ArraySource | RecordSource
