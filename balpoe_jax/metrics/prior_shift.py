# SPDX-License-Identifier: Apache-2.0
"""A test of whether unlabelled examples have another class prior than labelled ones."""

import numpy as np
import numpy.typing as npt

# Cells with a smaller expected count are merged: with them the statistic is no chi-square.
_LEAST_EXPECTED = 5.0


def prior_shift_p_value(
    predicted: npt.ArrayLike,
    held_out_predicted: npt.ArrayLike,
    held_out_labels: npt.ArrayLike,
    train_counts: npt.ArrayLike,
) -> float:
    """The p value of "the examples have a uniform class prior", from predicted classes alone.

    The predictions on the examples are compared with those on held-out ones, weighted so that every
    class that occurs there counts the same. The classifier need not be accurate or calibrated: if
    the images of each class look alike in both sets, a difference can only come from the class
    frequencies (Lipton et al., Detecting and Correcting for Label Shift with Black Box Predictors,
    ICML 2018; Rabanser et al., Failing Loudly, NeurIPS 2019).

    Two tests are made. A chi-square test of homogeneity finds any shift. A test of the mean
    logarithm of the predicted class's training size finds a shift to frequent or rare classes with
    fewer examples. The smaller of their p values is doubled, since there are two.

    Predictions of classes without held-out examples are left out, because their expected number is
    unknown. Held-out examples of unequal weight count as Kish's effective number.

    Args:
        predicted: Predicted classes of the examples, int `[N]`.
        held_out_predicted: Predicted classes of the held-out examples, int `[H]`.
        held_out_labels: True classes of the held-out examples, int `[H]`.
        train_counts: Training images of each class, int `[C]`, positive.

    Returns:
        The p value, in [0, 1]; 1 if there is nothing to compare.
    """
    sizes = np.asarray(train_counts, np.float64)
    num_classes = len(sizes)
    labels, held_out = np.asarray(held_out_labels), np.asarray(held_out_predicted)
    counts = np.bincount(labels, minlength=num_classes)
    weights = 1 / counts[labels]
    weights *= weights.sum() / np.square(weights).sum()
    comparable = np.flatnonzero(counts)
    examples = np.bincount(np.asarray(predicted, np.int64), minlength=num_classes)
    expected = np.bincount(held_out, weights, minlength=num_classes)
    observed = np.stack([examples, expected]).astype(np.float64)[:, comparable]
    if not observed.sum(axis=1).all():
        return 1.0
    trend = _trend_p_value(observed, np.log(sizes[comparable]))
    return min(1.0, 2 * min(_homogeneity_p_value(observed), trend))


def _homogeneity_p_value(observed: npt.NDArray[np.float64]) -> float:
    """The p value of a chi-square test that two rows of counts have one distribution."""
    cells = _merge_rare(observed)
    if cells.shape[1] < 2 or not cells.sum(axis=1).all():
        return 1.0
    from scipy import stats  # not above: its import takes seconds

    return float(stats.chi2_contingency(cells, correction=False).pvalue)


def _trend_p_value(observed: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> float:
    """The p value of a two-sided test that `values` have one mean under two rows of counts."""
    if np.ptp(values) == 0:
        return 1.0
    from scipy import stats  # as above

    totals = observed.sum(axis=1)
    shares = observed / totals[:, None]
    means = shares @ values
    variances = (shares * np.square(values - means[:, None])).sum(axis=1)
    error = np.sqrt((variances / totals).sum())
    return float(2 * stats.norm.sf(abs(means[0] - means[1]) / error)) if error > 0 else 1.0


def _merge_rare(observed: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Merges columns whose expected counts are too small; drops them if that is not enough.

    Args:
        observed: Counts float64 `[2, cells]`.
    """
    totals = observed.sum(axis=0)
    expected = totals * observed.sum(axis=1).min() / max(totals.sum(), 1)
    rare = expected < _LEAST_EXPECTED
    if expected[rare].sum() < _LEAST_EXPECTED:
        return observed[:, ~rare]
    merged = observed[:, rare].sum(axis=1, keepdims=True)
    return np.concatenate([observed[:, ~rare], merged], axis=1)
