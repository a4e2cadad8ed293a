# SPDX-License-Identifier: Apache-2.0
"""A loaded data set: its parts, their class counts and names."""

import dataclasses

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.records.sources import Source


@dataclasses.dataclass(frozen=True)
class LongTailed:
    """A long-tailed training set and its test set.

    Attributes:
        train: The training images.
        test: The whole test set.
        test_names: Names of the test examples in lists of files, str `[N]`.
        held_out: Labelled examples outside both, balanced as far as they go; None without any.
        held_out_description: Origin of the held-out examples, for reports.
        class_counts: Training images of each class, int64 `[C]`.
        counts_as_published: Whether the counts are those of the published data set, as they are
            unless `verify_counts=False`.
        class_names: Names of the classes; empty where only their numbers are known.
    """

    train: Source
    test: Source
    test_names: npt.NDArray[np.str_]
    held_out: Source | None
    held_out_description: str
    class_counts: npt.NDArray[np.int64]
    counts_as_published: bool
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without examples."""
        return len(self.class_counts)
