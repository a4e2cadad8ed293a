# SPDX-License-Identifier: Apache-2.0
"""Accuracy over all examples, by class, and by shot group (many, medium, few)."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError

# A class is few-shot below the first count and many-shot above the second.
DEFAULT_THRESHOLDS = (20, 100)


class ShotGroups(NamedTuple):
    """The classes that belong to each group: three bool `[C]`."""

    many: npt.NDArray[np.bool_]
    medium: npt.NDArray[np.bool_]
    few: npt.NDArray[np.bool_]


class ShotAccuracy(NamedTuple):
    """Accuracies as fractions in [0, 1]; `nan` where a group has no class with test examples.

    Attributes:
        all: Share of correct examples among all examples.
        many, medium, few: Mean accuracy of the group's classes.
        balanced: Mean accuracy of all classes.
        per_class: Accuracy of each class, float64 `[C]`; `nan` for one without test examples.
    """

    all: float
    many: float
    medium: float
    few: float
    balanced: float
    per_class: npt.NDArray[np.float64]


def shot_groups(
    train_counts: npt.ArrayLike, thresholds: tuple[int, int] = DEFAULT_THRESHOLDS
) -> ShotGroups:
    """Splits classes by training count: few `< low`, medium `low..high`, many `> high`.

    Args:
        train_counts: Training examples of each class, int `[C]`.
        thresholds: `(low, high)`; (20, 100) is the field's convention.

    Raises:
        UserError (a `ValueError`): thresholds that overlap, or counts that are no numbers.
    """
    low, high = thresholds
    if low > high + 1:
        raise UserError(f"shot thresholds must be (low, high) with low <= high, got {thresholds}.")
    try:
        counts = np.asarray(train_counts, np.float64)
    except (ValueError, OverflowError, TypeError) as error:
        raise UserError(f"train_counts must be numbers [C] ({error}).") from error
    return ShotGroups(counts > high, (counts >= low) & (counts <= high), counts < low)


def shot_accuracy(
    predictions: npt.ArrayLike,
    labels: npt.ArrayLike,
    train_counts: npt.ArrayLike,
    thresholds: tuple[int, int] = DEFAULT_THRESHOLDS,
) -> ShotAccuracy:
    """Top-1 accuracy over everything and by shot group.

    A group's figure is the unweighted mean over its classes, as in the reference repository. Two
    things differ: a class without test examples is left out of the means instead of making them
    `nan`, and an empty group is `nan` without affecting `balanced`.

    Args:
        predictions: Predicted classes, int `[N]`.
        labels: True classes, int `[N]` in `[0, C)`.
        train_counts: Training examples of each class, int `[C]`.
        thresholds: Thresholds of the groups, see `shot_groups`.

    Raises:
        UserError (a `ValueError`): shapes that do not fit, no example, or a label out of range.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    counts = np.asarray(train_counts)
    if predictions.shape != labels.shape or labels.ndim != 1 or labels.size == 0:
        raise UserError(
            "predictions and labels must be vectors of one length, at least 1, "
            f"got shapes {predictions.shape} and {labels.shape}."
        )
    if labels.min() < 0 or labels.max() >= len(counts):
        raise UserError(
            f"Labels must lie in 0..{len(counts) - 1} for {len(counts)} train_counts, "
            f"got {labels.min()}..{labels.max()}."
        )
    correct = predictions == labels
    totals = np.bincount(labels, minlength=len(counts))
    hits = np.bincount(labels, weights=correct, minlength=len(counts))
    per_class = np.divide(hits, totals, out=np.full(len(counts), np.nan), where=totals > 0)
    groups = shot_groups(counts, thresholds)
    return ShotAccuracy(
        all=float(correct.mean()),
        many=_mean_defined(per_class[groups.many]),
        medium=_mean_defined(per_class[groups.medium]),
        few=_mean_defined(per_class[groups.few]),
        balanced=_mean_defined(per_class),
        per_class=per_class,
    )


def shot_confusion(
    predictions: npt.ArrayLike,
    labels: npt.ArrayLike,
    train_counts: npt.ArrayLike,
    thresholds: tuple[int, int] = DEFAULT_THRESHOLDS,
) -> npt.NDArray[np.float64]:
    """How often the examples of each shot group are predicted in each group, right class or not.

    Args:
        predictions: Predicted classes, int `[N]`.
        labels: True classes, int `[N]`.
        train_counts: Training examples of each class, int `[C]`.
        thresholds: Thresholds of the groups, see `shot_groups`.

    Returns:
        float64 `[3, 3]`, with the groups many, medium and few: the fraction of the examples of a
        row's group that are predicted in a column's group. A row sums to 1, or is `nan` without
        examples.
    """
    groups = np.stack(shot_groups(train_counts, thresholds)).argmax(axis=0)
    pairs = 3 * groups[np.asarray(labels)] + groups[np.asarray(predictions)]
    counts = np.bincount(pairs, minlength=9).reshape(3, 3).astype(np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.full((3, 3), np.nan), where=totals > 0)


def disagreement(predictions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The fraction of examples on which two experts predict different classes, for all pairs.

    Args:
        predictions: Predicted classes, int `[E, N]`.

    Returns:
        float64 `[E, E]`, symmetric, zero on the diagonal.
    """
    predictions = np.asarray(predictions)
    return np.array([(predictions != one).mean(axis=1) for one in predictions])


def _mean_defined(values: npt.NDArray[np.float64]) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")
