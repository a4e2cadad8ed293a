# SPDX-License-Identifier: Apache-2.0
"""Random access to the examples of a split.

A source has `labels` int64 `[N]` and `keys` (where each example stood in the original data set),
and reads the images of given positions inside a tf.data graph.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from balpoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Decoded images of one size, in memory.

    Attributes:
        images: uint8 `[N, H, W, 3]`.
        labels: int64 `[N]`.
        keys: int64 `[N]`, positions in the original data set.
    """

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
