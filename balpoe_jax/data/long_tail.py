# SPDX-License-Identifier: Apache-2.0
"""The images that a long-tailed training set keeps: class counts and the selection. NumPy only.

The profile and the selection are those of the reference repository (and of LDAM-DRW, RIDE, SADE),
to the image: with the original order of CIFAR, `select_indices` returns the published subset.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError

# Up to here, counts are exact as floats too.
_LARGEST = 2**53


def exponential_counts(
    num_classes: int, max_count: int, imbalance_ratio: float, reverse: bool = False
) -> npt.NDArray[np.int64]:
    """Class counts that fall exponentially: `int(max_count * (1/ratio)**(c / (C-1)))`.

    Args:
        num_classes: `C`, at least 1.
        max_count: Images of the largest class.
        imbalance_ratio: Size of the largest class over the smallest, before rounding; at least 1.
        reverse: Whether class `C-1` is the largest instead of class 0 (the "backward" test sets).

    Returns:
        int64 `[C]`. For CIFAR-100 at ratio 100: 500 down to 5, a total of 10,847.

    Raises:
        UserError (a `ValueError`): numbers out of range.
    """
    numbers = all(isinstance(n, int | np.integer) for n in (num_classes, max_count))
    if not (
        numbers
        and isinstance(imbalance_ratio, int | float | np.number)
        and num_classes >= 1
        and 0 <= max_count <= _LARGEST
        and 1 <= imbalance_ratio <= _LARGEST
    ):
        raise UserError(
            "Expected num_classes >= 1, max_count >= 0 and imbalance_ratio >= 1, "
            f"got {num_classes!r:.40}, {max_count!r:.40} and {imbalance_ratio!r:.40}."
        )
    if num_classes == 1:
        return np.array([max_count], np.int64)
    # Python's scalar pow, in the reference's order: a vectorised pow may round differently, and
    # truncation turns the last bit into an image.
    factor = 1 / imbalance_ratio
    last = num_classes - 1
    ranks = range(last, -1, -1) if reverse else range(num_classes)
    return np.array([int(max_count * factor ** (rank / last)) for rank in ranks], np.int64)


def select_indices(
    labels: npt.ArrayLike, counts: npt.ArrayLike, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Positions of the kept images: the first `counts[c]` of each class after a seeded shuffle.

    One legacy NumPy stream (`RandomState(seed)`) runs through all classes, so the choice in a
    class depends on the sizes of the classes before it, as in the reference (seed 0).

    Args:
        labels: Classes in the original order of the data set, int `[N]` in `[0, C)`.
        counts: Images to keep of each class, int `[C]`.
        seed: Seed of the selection; not the seed of the run.

    Returns:
        int64 `[sum(counts)]`, ordered by class, within a class by the shuffle.

    Raises:
        UserError (a `ValueError`): a label out of range, or a class with too few images.
    """
    return select_consecutive(labels, (counts,), seed)[0]


def select_consecutive(
    labels: npt.ArrayLike, parts: Sequence[npt.ArrayLike], seed: int = 0
) -> list[npt.NDArray[np.int64]]:
    """Disjoint selections from one shuffle: in each class, a part continues after the one before.

    Args:
        labels: Classes as for `select_indices`, int `[N]`.
        parts: Images to keep of each class for each part, int `[C]` each.
        seed: Seed of the selection.

    Returns:
        Positions for each part, int64; the first part is that of `select_indices`.

    Raises:
        UserError (a `ValueError`): as for `select_indices`.
    """
    labels = as_array(labels, "labels")
    sizes = np.stack([check_counts(part) for part in parts])
    check_labels(labels, sizes.shape[1])
    random = np.random.RandomState(seed)
    chosen: list[list[npt.NDArray[np.intp]]] = [[] for _ in parts]
    for label, ends in enumerate(sizes.cumsum(axis=0).T):
        members = np.flatnonzero(labels == label)
        if len(members) < ends[-1]:
            raise UserError(
                f"Class {label} should keep {ends[-1]} images but has only {len(members)}; "
                "lower the counts or use the complete data set."
            )
        random.shuffle(members)
        for part, members_of_part in zip(chosen, np.split(members, ends), strict=False):
            part.append(members_of_part)
    return [np.concatenate(part).astype(np.int64) for part in chosen]


def class_counts(labels: npt.ArrayLike, num_classes: int) -> npt.NDArray[np.int64]:
    """Images of each class, int64 `[num_classes]`; raises UserError on labels out of range."""
    labels = as_array(labels, "labels")
    check_labels(labels, num_classes)
    return np.bincount(labels.astype(np.int64), minlength=num_classes).astype(np.int64)


def check_counts(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Counts as int64 `[C]`; raises UserError unless they are whole numbers from 0 on."""
    array = as_array(counts, "counts")
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise UserError(f"counts must be integers [C], got {array.dtype} {array.shape}.")
    if array.min() < 0 or array.max() > _LARGEST:
        raise UserError(
            f"counts must not be negative, and at most 2**53, got {array.min()} to {array.max()}."
        )
    return array.astype(np.int64)


def as_array(values: npt.ArrayLike, name: str) -> npt.NDArray:
    """The values as an array; raises UserError on nested lists of unequal lengths."""
    try:
        return np.asarray(values)
    except (ValueError, OverflowError, TypeError) as error:
        raise UserError(f"{name} must be an array of numbers ({error}).") from error


def check_labels(labels: npt.NDArray, num_classes: int) -> None:
    """Raises UserError unless `labels` are integers `[N]` in `[0, num_classes)`."""
    if labels.ndim != 1 or (labels.size and labels.dtype.kind not in "iu"):
        raise UserError(f"labels must be integers [N], got {labels.dtype} {labels.shape}.")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise UserError(
            f"Labels must lie in 0..{num_classes - 1}, but {wrong.size} do not "
            f"(the first: label {labels[wrong[0]]} at position {wrong[0]}); "
            "check num_classes against the data set."
        )
