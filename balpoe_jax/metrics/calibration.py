# SPDX-License-Identifier: Apache-2.0
"""Confidence calibration over a whole test set: ECE, MCE and the bins behind them; NLL; Brier."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from balpoe_jax.errors import UserError


class Calibration(NamedTuple):
    """Calibration errors in [0, 1] and the bins of the reliability diagram.

    Attributes:
        ece: Expected calibration error, the mean over examples of their bin's gap.
        mce: Maximum calibration error, the largest gap of a bin that is not empty.
        bin_accuracy, bin_confidence: Means in each bin, float64 `[num_bins]`; 0 in an empty bin.
        bin_fraction: Share of the examples in each bin, float64 `[num_bins]`.
    """

    ece: float
    mce: float
    bin_accuracy: npt.NDArray[np.float64]
    bin_confidence: npt.NDArray[np.float64]
    bin_fraction: npt.NDArray[np.float64]


def calibration(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, num_bins: int = 15
) -> Calibration:
    """Bins examples by confidence (the largest probability), and compares it with accuracy.

    Bins have equal width and are closed above, `(lower, upper]`, with edges
    `linspace(0, 1, num_bins + 1)`. The errors are sums over the whole set, never means of batches
    (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, and the reference). Unlike in
    the reference, a confidence that rounding puts above 1 counts in the last bin instead of being
    lost, and one of exactly 0, which no softmax gives, in the first.

    Args:
        probabilities: Probabilities of the classes, float `[N, C]`. Ties go to the lowest class.
        labels: True classes, int `[N]`.
        num_bins: Number of bins, at least 1.

    Raises:
        UserError (a `ValueError`): shapes that do not fit, no example, or values that are not
            probabilities.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    _check(probabilities, labels)
    return bin_confidences(
        probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, num_bins
    )


def bin_confidences(
    confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_], num_bins: int = 15
) -> Calibration:
    """`calibration` of examples whose probabilities were not kept.

    Args:
        confidence: Probability of the predicted class, float `[N]` in [0, 1].
        correct: Whether the predicted class was right, bool `[N]`.
        num_bins: Number of bins, at least 1.

    Raises:
        UserError (a `ValueError`): no example, or no bin.
    """
    _check_bins(confidence, num_bins)
    edges = np.linspace(0, 1, num_bins + 1)
    bins = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
    return _errors_of_bins(confidence, correct, bins, num_bins)


def adaptive_calibration_error(
    confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_], num_bins: int = 15
) -> float:
    """ECE over bins that hold equal numbers of examples instead of having equal widths.

    Where most confidences are high, equal widths leave most bins nearly empty (Nguyen and
    O'Connor, EMNLP 2015; Mukhoti et al., NeurIPS 2020). Equal confidences share a bin, so the
    result does not depend on the order of the examples; a bin may then hold more than its share.

    Args:
        confidence: Probability of the predicted class, float `[N]` in [0, 1].
        correct: Whether the predicted class was right, bool `[N]`.
        num_bins: Number of bins, at least 1.

    Returns:
        A fraction in [0, 1].

    Raises:
        UserError (a `ValueError`): no example, or no bin.
    """
    _check_bins(confidence, num_bins)
    ranks = np.ceil(np.arange(1, num_bins + 1) * len(confidence) / num_bins).astype(int) - 1
    upper_edges = np.sort(confidence)[ranks]
    bins = np.searchsorted(upper_edges, confidence, side="left")
    return _errors_of_bins(confidence, correct, bins, num_bins).ece


def brier_score(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean squared distance of float `[N, C]` from the one-hot labels int `[N]`: 0 to 2.

    Brier, Verification of forecasts expressed in terms of probability, 1950.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    _check(probabilities, labels)
    picked = probabilities[np.arange(len(labels)), labels]
    return float(np.mean((probabilities**2).sum(axis=1) - 2 * picked + 1))


def _errors_of_bins(
    confidence: npt.NDArray[np.float64],
    correct: npt.NDArray[np.bool_],
    bins: npt.NDArray[np.intp],
    num_bins: int,
) -> Calibration:
    sizes = np.bincount(bins, minlength=num_bins)
    filled = np.maximum(sizes, 1)
    accuracy = np.bincount(bins, weights=correct, minlength=num_bins) / filled
    mean_confidence = np.bincount(bins, weights=confidence, minlength=num_bins) / filled
    fraction = sizes / len(confidence)
    gap = np.abs(accuracy - mean_confidence)
    return Calibration(
        ece=float(np.sum(fraction * gap)),
        mce=float(gap[sizes > 0].max()),
        bin_accuracy=accuracy,
        bin_confidence=mean_confidence,
        bin_fraction=fraction,
    )


def negative_log_likelihood(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean of `-log softmax(logits)[label]` in nats, from float `[N, C]` and int `[N]`.

    It takes logits, so that a probability that underflows does not make it infinite.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    log_probabilities = special.log_softmax(logits, axis=1)
    return float(-np.mean(log_probabilities[np.arange(len(labels)), labels]))


def softmax(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Softmax over the last axis in float64."""
    return special.softmax(np.asarray(logits, np.float64), axis=-1)


def _check_bins(confidence: npt.NDArray[np.float64], num_bins: int) -> None:
    if num_bins < 1:
        raise UserError(f"num_bins must be at least 1, got {num_bins}.")
    if confidence.ndim != 1 or not confidence.size:
        raise UserError(f"Expected the confidence of at least one example, got {confidence.shape}.")


def _check(probabilities: npt.NDArray[np.float64], labels: npt.NDArray) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or labels.size == 0:
        raise UserError(
            "Expected probabilities [N, C] and labels [N] with N >= 1, "
            f"got shapes {probabilities.shape} and {labels.shape}."
        )
    low, high = probabilities.min(), probabilities.max()
    if not (low >= 0 and high <= 1 + 1e-6):
        raise UserError(
            f"Probabilities must lie in [0, 1], got {low} to {high}; pass logits through softmax."
        )
