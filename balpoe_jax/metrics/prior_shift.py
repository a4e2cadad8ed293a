# SPDX-License-Identifier: Apache-2.0
"""Do unlabelled examples have another class prior than labelled ones? A test on predictions."""

import numpy as np
import numpy.typing as npt

# Cells expected to hold fewer are merged: the statistic is far from a chi-square below.
_LEAST_EXPECTED = 5.0


def prior_shift_p_value(
    predicted: npt.ArrayLike,
    held_out_predicted: npt.ArrayLike,
    held_out_labels: npt.ArrayLike,
    train_counts: npt.ArrayLike,
) -> float:
    """The p value of "the examples have a uniform class prior", from predicted classes alone.

    The predictions on the examples are compared with those on held-out ones, weighted so that every
    class that occurs there counts the same. That asks nothing of the classifier's accuracy or
    calibration: if the images of each class look alike in both sets, a difference can only come
    from the class frequencies (Lipton et al., Detecting and Correcting for Label Shift with Black
    Box Predictors, ICML 2018; Rabanser et al., Failing Loudly, NeurIPS 2019). Two tests are made: a
    chi-square test of homogeneity, for any shift, and one of the mean logarithm of the predicted
    class's training size, which sees a shift to frequent or rare classes much sooner. The smaller
    of their p values is doubled, since there are two.

    Predictions of classes without held-out examples are left out, as nothing says how often they
    should be made; held-out examples of unequal weight count as Kish's effective number.

    Args:
        predicted: int `[N]`, the examples' predicted classes.
        held_out_predicted: int `[H]`, those of the labelled ones.
        held_out_labels: int `[H]`, their classes.
        train_counts: int `[C]`, positive.

    Returns:
        In [0, 1]; 1 if there is nothing to compare.
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
    """Of a chi-square test that two rows of counts are of one distribution."""
    cells = _merge_rare(observed)
    if cells.shape[1] < 2 or not cells.sum(axis=1).all():
        return 1.0
    from scipy import stats  # not above: it takes seconds to import

    return float(stats.chi2_contingency(cells, correction=False).pvalue)


def _trend_p_value(observed: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> float:
    """Of a two-sided test that the mean of `values` is the same under two rows of counts."""
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
    """Columns whose expected counts are too small become one; dropped if that is still too small.

    Args:
        observed: `[2, cells]`.
    """
    totals = observed.sum(axis=0)
    expected = totals * observed.sum(axis=1).min() / max(totals.sum(), 1)
    rare = expected < _LEAST_EXPECTED
    if expected[rare].sum() < _LEAST_EXPECTED:
        return observed[:, ~rare]
    merged = observed[:, rare].sum(axis=1, keepdims=True)
    return np.concatenate([observed[:, ~rare], merged], axis=1)
