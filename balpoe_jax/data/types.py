# SPDX-License-Identifier: Apache-2.0
"""Batches that a pipeline hands to a step; their arrays are NumPy's, TensorFlow's or JAX's."""

from typing import Any, NamedTuple


class TrainBatch(NamedTuple):
    """A batch to train on.

    Attributes:
        views: Differently augmented views of the same images, each float `[b, H, W, 3]`; the first
            one alone is mixed, by a rule of two views the second one too.
        labels: Classes, int32 `[b]`.
        other_labels: Classes of the partners that images are mixed with, int32 `[b]`.
        mix_weight: Share of `labels`, float32 `[b]`; 1 where an image is not mixed.
    """

    views: tuple[Any, ...]
    labels: Any
    other_labels: Any
    mix_weight: Any

    @property
    def images(self) -> Any:
        """The first view."""
        return self.views[0]


class EvalBatch(NamedTuple):
    """A batch to predict.

    Attributes:
        images: Float `[b, H, W, 3]`.
        labels: Classes, int32 `[b]`.
        mask: Mask of the examples, bool `[b]`; False for the padding of the last batch.
    """

    images: Any
    labels: Any
    mask: Any
