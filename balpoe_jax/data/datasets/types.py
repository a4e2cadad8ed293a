# SPDX-License-Identifier: Apache-2.0
"""What a data set hands to the rest: its parts, their class counts and names."""

import dataclasses

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.records.sources import Source


@dataclasses.dataclass(frozen=True)
class LongTailed:
    """A long-tailed training set and its test set.

    Attributes:
        train: the training images.
        test: the whole test set.
        test_names: str `[N]`, what lists of files call the test examples.
        held_out: labelled examples outside both, balanced as far as they go; None without any.
        held_out_description: where they are from.
        class_counts: int64 `[C]`, training images of each class.
        counts_as_published: False if the counts are not what the data set should have, which
            only `verify_counts=False` lets through.
    """

    train: Source
    test: Source
    test_names: npt.NDArray[np.str_]
    held_out: Source | None
    held_out_description: str
    class_counts: npt.NDArray[np.int64]
    counts_as_published: bool

    @property
    def num_classes(self) -> int:
        """Classes of the data set, whether or not they have examples."""
        return len(self.class_counts)
