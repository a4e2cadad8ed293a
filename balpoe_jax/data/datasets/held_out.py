# SPDX-License-Identifier: Apache-2.0
"""Training images that are held out to choose by, where no others may be used."""

import dataclasses

import numpy as np
import numpy.typing as npt

from balpoe_jax.data import long_tail
from balpoe_jax.data.datasets.types import LongTailed


def held_out_counts(counts: npt.ArrayLike, share: float) -> npt.NDArray[np.int64]:
    """Images to hold out of each class, int64 `[C]`: the share, at least one, but never the last.

    Args:
        counts: Training images of each class, int `[C]`.
        share: Share of each class, in (0, 1).
    """
    counts = long_tail.check_counts(counts)
    wanted = np.maximum(np.floor(share * counts), 1).astype(np.int64)
    return np.minimum(wanted, np.maximum(counts - 1, 0))


def hold_out_of_training(data: LongTailed, share: float) -> LongTailed:
    """The data set with the last images of each class held out in place of unused ones.

    The classes stay as unequal as they are, in training and among the images held out. Scores on
    the latter are therefore to be averaged over classes.

    Args:
        data: Long-tailed data set.
        share: Share of each class's training images, see `held_out_counts`.
    """
    held = held_out_counts(data.class_counts, share)
    is_held = np.zeros(len(data.train), bool)
    for label, number in enumerate(held):
        members = np.flatnonzero(data.train.labels == label)
        is_held[members[len(members) - number :]] = True
    return dataclasses.replace(
        data,
        train=data.train.select(np.flatnonzero(~is_held)),
        held_out=data.train.select(np.flatnonzero(is_held)),
        held_out_description=(
            f"{held.sum():,} of the {data.class_counts.sum():,} training images, {100 * share:g}% "
            "of each class and at least one, which training does without"
        ),
        class_counts=data.class_counts - held,
        counts_as_published=False,
    )
