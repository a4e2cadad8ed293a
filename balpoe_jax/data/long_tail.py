# SPDX-License-Identifier: Apache-2.0
"""Which images a long-tailed training set keeps: class counts and the selection itself. NumPy only.

The profile and the selection are those of the reference repository (and of LDAM-DRW, RIDE, SADE),
to the image: with the original order of CIFAR, `select_indices` returns the published subset.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError

# Counts are exact as floats too.
_LARGEST = 2**53


def exponential_counts(
    num_classes: int, max_count: int, imbalance_ratio: float, reverse: bool = False
) -> npt.NDArray[np.int64]:
    """Class counts that fall exponentially: `int(max_count * (1/ratio)**(c / (C-1)))`.

    Args:
        num_classes: `C`, at least 1.
        max_count: images of the largest class.
        imbalance_ratio: largest over smallest class before rounding down, at least 1.
        reverse: class `C-1` is the largest instead of class 0 (the "backward" test sets).

    Returns:
        int64 `[C]`. CIFAR-100 at ratio 100: 500 ... 5, in all 10,847.

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
    """Positions of the kept images: class by class, a seeded shuffle, the first `counts[c]`.

    One legacy NumPy stream (`RandomState(seed)`) runs through all classes, so the choice in a
    class depends on the sizes of the classes before it, as in the reference (seed 0).

    Args:
        labels: int `[N]`, in the original order of the data set, values in `[0, C)`.
        counts: int `[C]`, images to keep of each class.
        seed: of the selection; not the seed of the run.

    Returns:
        int64 `[sum(counts)]`, ordered by class, within a class by the shuffle.

    Raises:
        UserError (a `ValueError`): a label out of range, or a class with fewer images than asked.
    """
    return select_consecutive(labels, (counts,), seed)[0]


def select_consecutive(
    labels: npt.ArrayLike, parts: Sequence[npt.ArrayLike], seed: int = 0
) -> list[npt.NDArray[np.int64]]:
    """Disjoint selections out of one shuffle: each takes up in a class where the one before ended.

    Args:
        labels: int `[N]`, as for `select_indices`, which the first part equals.
        parts: int `[C]` each, images of each class.
        seed: of the selection.

    Returns:
        For each part what `select_indices` would return.

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
    """Images of each class, int64 `[num_classes]`; refuses labels out of range."""
    labels = as_array(labels, "labels")
    check_labels(labels, num_classes)
    return np.bincount(labels.astype(np.int64), minlength=num_classes).astype(np.int64)


def check_counts(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Images of each class as int64 `[C]`; refuses what is no list of whole numbers from 0 on."""
    array = as_array(counts, "counts")
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise UserError(f"counts must be integers [C], got {array.dtype} {array.shape}.")
    if array.min() < 0 or array.max() > _LARGEST:
        raise UserError(
            f"counts must not be negative, and at most 2**53, got {array.min()} to {array.max()}."
        )
    return array.astype(np.int64)


def as_array(values: npt.ArrayLike, name: str) -> npt.NDArray:
    """An array of what is given; refuses nested lists of unequal lengths."""
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
