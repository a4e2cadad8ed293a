# SPDX-License-Identifier: Apache-2.0
"""Tables of all classes and of the pairs that are confused most, from a test set's predictions."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from balpoe_jax.evaluation.pictures import RARE, WRONG, Picture
from balpoe_jax.reporting.tables import Column, Table

_PAIRS = 20
_KINDS = {WRONG: "wrong with high confidence", RARE: "of a rare class"}

Counts = npt.NDArray[np.int64]


def class_table(
    names: Sequence[str],
    train_counts: Counts,
    labels: npt.NDArray[np.integer],
    predicted: npt.NDArray[np.integer],
    confidence: npt.NDArray[np.floating],
    num_bins: int,
) -> Table:
    """A row for each class, from the most frequent to the rarest.

    Recall, confidence and ECE are over the test images of a class, precision over the images that
    are predicted as it. F1 is their harmonic mean with 0 for a class that is never predicted
    right. What is undefined is left out of the means.

    Args:
        names: Name of each class.
        train_counts: Training images of each class, int `[C]`.
        labels: True classes, int `[N]`.
        predicted: Predicted classes, int `[N]`.
        confidence: Probability of the predicted class, float `[N]`.
        num_bins: Number of bins of the ECE.
    """
    classes = len(names)
    tested = np.bincount(labels, minlength=classes)
    named = np.bincount(predicted, minlength=classes)
    right = np.bincount(labels[labels == predicted], minlength=classes)
    recall, precision = _share(right, tested), _share(right, named)
    f1 = _share(2 * right, tested + named)
    f1[tested == 0] = np.nan
    confident = _share(np.bincount(labels, confidence, classes), tested)
    errors = _calibration_errors(labels, predicted, confidence, classes, num_bins)
    other = _most_confused(labels, predicted, classes)
    order = np.argsort(-train_counts, kind="stable")
    rows = [
        (
            names[i],
            [
                *(str(train_counts[i]), str(tested[i]), recall[i], precision[i], f1[i]),
                *(confident[i], errors[i], names[other[i]] if other[i] >= 0 else None),
            ],
        )
        for i in order
    ]
    columns = (
        *(Column("training images", "number"), Column("test images", "number")),
        *(Column(name) for name in ("recall", "precision", "F1", "confidence", "ECE")),
        Column("most confused with"),
    )
    return Table(
        "classes",
        "Every class",
        columns,
        rows,
        f"The ensemble on the test set, in percent. Balanced accuracy (mean recall) "
        f"{_percent(recall)}, macro-F1 {_percent(f1)}, over classes with test images.",
    )


def confused_pairs(
    names: Sequence[str],
    labels: npt.NDArray[np.integer],
    predicted: npt.NDArray[np.integer],
) -> Table:
    """The pairs of classes with most images of one that are taken for the other.

    Args:
        names: Name of each class.
        labels: True classes, int `[N]`.
        predicted: Predicted classes, int `[N]`.
    """
    classes = len(names)
    tested = np.bincount(labels, minlength=classes)
    wrong = labels != predicted
    pairs = labels[wrong].astype(np.int64) * classes + predicted[wrong]
    found, times = np.unique(pairs, return_counts=True)
    order = np.argsort(-times, kind="stable")[:_PAIRS]
    rows = [
        (
            f"{names[pair // classes]} as {names[pair % classes]}",
            [str(number), number / tested[pair // classes]],
        )
        for pair, number in zip(found[order], times[order], strict=True)
    ]
    columns = (Column("images", "number"), Column("of the class"))
    note = "Test images of the first class that the ensemble takes for the second, and their share."
    return Table("confused", "Most confused classes", columns, rows, note)


def picture_table(names: Sequence[str], shown: Sequence[Picture]) -> Table:
    """The pictures of the page by the names of their files.

    Args:
        names: Name of each class.
        shown: Pictures.
    """
    rows = [
        (
            picture.name,
            [
                _KINDS[picture.kind],
                names[picture.label],
                names[picture.predicted],
                picture.confidence,
            ],
        )
        for picture in shown
    ]
    columns = (*(Column(name) for name in ("shown as", "class", "predicted", "confidence")),)
    return Table("pictures", "Pictures", columns, rows, "Test images that the page shows.")


def _share(part: npt.NDArray, whole: npt.NDArray) -> npt.NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _percent(values: npt.NDArray[np.float64]) -> str:
    return "-" if np.isnan(values).all() else f"{100 * np.nanmean(values):.1f}"


def _calibration_errors(
    labels: npt.NDArray[np.integer],
    predicted: npt.NDArray[np.integer],
    confidence: npt.NDArray[np.floating],
    classes: int,
    num_bins: int,
) -> npt.NDArray[np.float64]:
    """The ECE over the test images of each class, float `[C]`."""
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    cells = labels.astype(np.int64) * num_bins + bins
    gaps = np.bincount(cells, (labels == predicted) - confidence, classes * num_bins)
    totals = np.abs(gaps).reshape(classes, num_bins).sum(axis=1)
    return _share(totals, np.bincount(labels, minlength=classes))


def _most_confused(
    labels: npt.NDArray[np.integer], predicted: npt.NDArray[np.integer], classes: int
) -> npt.NDArray[np.int64]:
    """The class that images of each class are most often taken for wrongly; -1 for none."""
    wrong = labels != predicted
    pairs, times = np.unique(
        labels[wrong].astype(np.int64) * classes + predicted[wrong], return_counts=True
    )
    other = np.full(classes, -1, np.int64)
    # The most frequent comes last, and of equals the first class.
    for pair in pairs[np.lexsort((-pairs, times))]:
        other[pair // classes] = pair % classes
    return other
