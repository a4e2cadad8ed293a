# SPDX-License-Identifier: Apache-2.0
"""Temperature and class biases: recovered from logits that were spoilt on purpose."""

import numpy as np
import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.metrics import (
    fit_bias_correction,
    fit_temperature,
    negative_log_likelihood,
    softmax,
)


def calibrated(num_examples: int = 20_000, num_classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(num_examples, num_classes)) * 2
    chance = random.random(num_examples)[:, None]
    return logits, (softmax(logits).cumsum(axis=1) < chance).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_temperature_is_recovered(temperature: float) -> None:
    logits, labels = calibrated()
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_a_temperature_is_the_least_of_a_grid() -> None:
    logits, labels = calibrated(200)
    found = fit_temperature(3 * logits, labels)
    best = negative_log_likelihood(3 * logits / found, labels)
    grid = [negative_log_likelihood(3 * logits / t, labels) for t in np.geomspace(0.1, 20, 400)]
    assert best <= min(grid)
    assert best == pytest.approx(min(grid), rel=1e-4)


def test_a_temperature_has_an_end() -> None:
    labels = np.array([0, 1, 2])
    assert 1e-3 <= fit_temperature(np.eye(3), labels) < 0.05
    assert 20 < fit_temperature(np.eye(3)[[1, 2, 0]], labels) <= 1e3


def test_biases_are_recovered() -> None:
    logits, labels = calibrated()
    spoilt = 2 * (logits - np.array([1.0, 0, 0, -1, 0]))
    found = fit_bias_correction(spoilt, labels)
    assert found.scale == pytest.approx(0.5, rel=0.05)
    np.testing.assert_allclose(found.bias - found.bias[1], [1, 0, 0, -1, 0], atol=0.1)


def test_the_corrected_mean_prediction_of_a_class_is_its_share() -> None:
    """What estimating a prior needs, and a temperature alone does not give."""
    logits, labels = calibrated(5000)
    spoilt = logits - np.array([1.0, 0, 0, -1, 0])
    found = fit_bias_correction(spoilt, labels, penalty=1e-6)
    counts = np.bincount(labels)
    weights = 1 / counts[labels]
    marginal = np.average(softmax(found.scale * spoilt + found.bias), axis=0, weights=weights)
    np.testing.assert_allclose(marginal, 0.2, atol=1e-3)


def test_a_class_without_examples_keeps_its_logits() -> None:
    logits, labels = calibrated(400)
    kept = labels != 2
    found = fit_bias_correction(logits[kept], labels[kept])
    assert found.bias[2] == 0
    assert np.abs(found.bias).max() < 2


def test_a_large_penalty_leaves_a_temperature() -> None:
    logits, labels = calibrated(2000)
    found = fit_bias_correction(3 * logits, labels, penalty=1e9)
    assert np.abs(found.bias).max() < 1e-5
    assert 1 / found.scale == pytest.approx(fit_temperature(3 * logits, labels), rel=0.05)


@pytest.mark.parametrize("fit", [fit_temperature, fit_bias_correction])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3)), [0], r"shapes \(2, 3\) and \(1,\)"),
        (np.zeros((0, 3)), [], "N >= 1"),
        (np.full((1, 3), np.inf), [0], "finite"),
    ],
)
def test_fitting_refuses(fit, logits, labels, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(logits, labels)
