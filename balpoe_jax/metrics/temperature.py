# SPDX-License-Identifier: Apache-2.0
"""Corrections of logits that are fitted on held-out labelled examples."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from balpoe_jax.errors import UserError

_LARGEST_TEMPERATURE = 1e3


class Correction(NamedTuple):
    """A correction of logits to `scale * logits + bias`.

    Attributes:
        scale: Inverse of a temperature, positive.
        bias: Bias of each class, float64 `[C]`.
    """

    scale: float
    bias: npt.NDArray[np.float64]


def fit_temperature(
    logits: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> float:
    """The temperature `T` for which `softmax(logits / T)` has the least negative log-likelihood.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017. The loss is convex in `1 / T`,
    so there is one minimum. If it lies at T = 0 (every prediction right) or at infinity (every one
    wrong), the result is a temperature in [1/1000, 1000] beyond which the loss is flat.

    Args:
        logits: Logits float `[N, C]`.
        labels: True classes, int `[N]`.
        weights: Weight of each example, float `[N]`; None for equal ones.

    Raises:
        UserError (a `ValueError`): shapes that do not fit, or no example.
    """
    logits, labels = _checked(logits, labels)
    rows, shares = np.arange(len(labels)), None
    if weights is not None:
        shares = np.asarray(weights, np.float64)
        if shares.shape != labels.shape:
            raise UserError(f"Expected {len(labels)} weights, got a shape of {shares.shape}.")

    def loss(log_scale: float) -> float:
        values = special.log_softmax(logits * np.exp(log_scale), axis=1)
        return float(-np.average(values[rows, labels], weights=shares))

    bound = np.log(_LARGEST_TEMPERATURE)
    from scipy import optimize  # not above: its import takes a while

    found = optimize.minimize_scalar(
        loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(-found.x))


def fit_bias_correction(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    train_counts: npt.ArrayLike,
    penalty: float = 1.0,
) -> Correction:
    """Fits a temperature and class biases together, to estimate a prior with the logits.

    A temperature does not correct the mean prediction of each class, on which the estimate of a
    prior depends (bias-corrected temperature scaling: Alexandari et al., Maximum Likelihood with
    Bias-Corrected Calibration is Hard-To-Beat at Label Shift Adaptation, ICML 2020). Examples are
    weighted so that every class that occurs counts the same, as under a uniform prior.

    A bias is a trend plus a rest. The trend `a * log(train_counts)`, which training on a long tail
    leaves, is free; the rest is penalised. A class without examples follows the trend, such as the
    largest class of a data set that keeps all of it for training. Its logits have no part in the
    fit, so that nothing is learnt from its absence.

    Args:
        logits: Logits float `[N, C]`.
        labels: True classes, int `[N]`.
        train_counts: Training images of each class, int `[C]`, positive.
        penalty: Weight of half the sum of squared rests, against a sum of losses in which an
            example counts 1 on average.

    Raises:
        UserError (a `ValueError`): shapes that do not fit, or no example.
    """
    logits, labels = _checked(logits, labels)
    sizes = np.asarray(train_counts, np.float64)
    if sizes.shape != logits.shape[1:] or not sizes.min() > 0:
        raise UserError(
            f"Expected {logits.shape[1]} positive training counts, got {sizes.size} with a minimum "
            f"of {sizes.min():g}."
        )
    trend = np.log(sizes)
    counts = np.bincount(labels, minlength=len(trend))
    present = np.flatnonzero(counts)
    trend -= trend[present].mean()
    weights = len(labels) / (len(present) * counts[labels])
    loss = _bias_loss(
        logits[:, present], np.searchsorted(present, labels), trend[present], weights, penalty
    )
    bound = np.log(_LARGEST_TEMPERATURE)
    bounds = [(-bound, bound), *[(None, None)] * (1 + len(present))]
    from scipy import optimize  # as above

    found = optimize.minimize(
        loss, np.zeros(2 + len(present)), jac=True, bounds=bounds, method="L-BFGS-B"
    )
    log_scale, slope, rest = found.x[0], found.x[1], found.x[2:]
    bias = slope * trend
    bias[present] += rest
    return Correction(float(np.exp(log_scale)), bias)


def _bias_loss(
    logits: npt.NDArray[np.float64],
    labels: npt.NDArray[np.integer],
    trend: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    penalty: float,
) -> Callable[[npt.NDArray[np.float64]], tuple[float, npt.NDArray[np.float64]]]:
    """A function of log scale, slope of the trend and rests that returns loss and gradient."""
    rows = np.arange(len(labels))

    def loss(parameters: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        scale, slope, rest = np.exp(parameters[0]), parameters[1], parameters[2:]
        values = logits * scale + (slope * trend + rest)
        values -= values.max(axis=1, keepdims=True)
        picked = values[rows, labels]
        np.exp(values, out=values)
        totals = values.sum(axis=1)
        value = np.sum(weights * (np.log(totals) - picked)) + penalty / 2 * np.sum(rest**2)
        values *= (weights / totals)[:, None]
        values[rows, labels] -= weights
        by_bias = values.sum(axis=0)
        by_scale = scale * np.einsum("nc,nc->", values, logits)
        return float(value), np.concatenate([[by_scale, by_bias @ trend], by_bias + penalty * rest])

    return loss


def _checked(
    logits: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.integer]]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not labels.size:
        raise UserError(
            "Expected logits [N, C] and labels [N] with N >= 1, "
            f"got shapes {logits.shape} and {labels.shape}."
        )
    if not np.isfinite(logits).all():
        raise UserError("Expected finite logits to calibrate, got some that are not.")
    return logits, labels
