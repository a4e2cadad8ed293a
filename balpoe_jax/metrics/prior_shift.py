# SPDX-License-Identifier: Apache-2.0
"""Do unlabelled examples have another class prior than labelled ones? A test on predictions."""

import numpy as np
import numpy.typing as npt
from scipy import stats

# Cells expected to hold fewer are merged: the statistic is far from a chi-square below.
_LEAST_EXPECTED = 5.0


def prior_shift_p_value(
    predicted: npt.ArrayLike,
    held_out_predicted: npt.ArrayLike,
    held_out_labels: npt.ArrayLike,
    num_classes: int,
) -> float:
    """The p value of "the examples have a uniform class prior", from predicted classes alone.

    A chi-square test of homogeneity between the predictions on the examples and those on held-out
    ones, weighted so that every class that occurs there counts the same. It asks nothing of the
    classifier's accuracy or calibration: if the images of each class look alike in both sets, a
    difference can only come from the class frequencies (Lipton et al., Detecting and Correcting
    for Label Shift with Black Box Predictors, ICML 2018; Rabanser et al., Failing Loudly, NeurIPS
    2019). Predictions of classes without held-out examples are left out, as nothing says how often
    they should be made; held-out examples of unequal weight count as Kish's effective number.

    Args:
        predicted: int `[N]`, the examples' predicted classes.
        held_out_predicted: int `[H]`, those of the labelled ones.
        held_out_labels: int `[H]`, their classes.
        num_classes: `C`.

    Returns:
        In [0, 1]; 1 if less than two cells can be compared.
    """
    labels, held_out = np.asarray(held_out_labels), np.asarray(held_out_predicted)
    counts = np.bincount(labels, minlength=num_classes)
    weights = 1 / counts[labels]
    weights *= weights.sum() / np.square(weights).sum()
    comparable = np.flatnonzero(counts)
    observed = np.stack(
        [
            np.bincount(np.asarray(predicted, np.int64), minlength=num_classes)[comparable],
            np.bincount(held_out, weights, minlength=num_classes)[comparable],
        ]
    )
    cells = _merge_rare(observed.astype(np.float64))
    if cells.shape[1] < 2 or not cells.sum(axis=1).all():
        return 1.0
    return float(stats.chi2_contingency(cells, correction=False).pvalue)


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
