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
from balpoe_jax.metrics import temperature as recalibration

COUNTS = np.array([500, 200, 100, 20, 5])


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


def test_a_weight_is_a_number_of_examples() -> None:
    random = np.random.default_rng(3)
    logits, labels = 2 * random.normal(size=(60, 4)), random.integers(0, 4, 60)
    times = random.integers(0, 4, 60)
    found = recalibration.fit_temperature(logits, labels, times)
    repeated = np.repeat(np.arange(60), times)
    assert found == pytest.approx(
        recalibration.fit_temperature(logits[repeated], labels[repeated]), rel=1e-5
    )
    assert abs(found - recalibration.fit_temperature(logits, labels)) > 1e-2 * found
    with pytest.raises(UserError, match=r"Expected 60 weights, got a shape of \(59,\)"):
        recalibration.fit_temperature(logits, labels, times[:-1])


def test_a_temperature_has_an_end() -> None:
    labels = np.array([0, 1, 2])
    assert 1e-3 <= fit_temperature(np.eye(3), labels) < 0.05
    assert 20 < fit_temperature(np.eye(3)[[1, 2, 0]], labels) <= 1e3


def test_biases_are_recovered() -> None:
    logits, labels = calibrated()
    spoilt = 2 * (logits - np.array([1.0, 0, 0, -1, 0]))
    found = fit_bias_correction(spoilt, labels, np.ones(5))
    assert found.scale == pytest.approx(0.5, rel=0.05)
    np.testing.assert_allclose(found.bias - found.bias[1], [1, 0, 0, -1, 0], atol=0.1)


def test_the_corrected_mean_prediction_of_a_class_is_its_share() -> None:
    """What estimating a prior needs, and a temperature alone does not give."""
    logits, labels = calibrated(5000)
    spoilt = logits - np.array([1.0, 0, 0, -1, 0])
    found = fit_bias_correction(spoilt, labels, COUNTS, penalty=1e-6)
    counts = np.bincount(labels)
    weights = 1 / counts[labels]
    marginal = np.average(softmax(found.scale * spoilt + found.bias), axis=0, weights=weights)
    np.testing.assert_allclose(marginal, 0.2, atol=1e-3)


def test_a_class_without_examples_is_not_learnt_to_be_absent() -> None:
    logits, labels = calibrated(400)
    kept = labels != 2
    found = fit_bias_correction(logits[kept], labels[kept], np.ones(5))
    assert found.bias[2] == 0
    assert np.abs(found.bias).max() < 2


@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.5])
def test_a_class_without_examples_follows_the_trend(slope: float) -> None:
    """The largest class has no held-out images; logits lean to it by its training frequency."""
    logits, labels = calibrated()
    spoilt = logits - slope * np.log(COUNTS)
    kept = labels != 0
    found = fit_bias_correction(spoilt[kept], labels[kept], COUNTS)
    expected = slope * np.log(COUNTS / COUNTS[4])
    np.testing.assert_allclose((found.bias - found.bias[4])[1:], expected[1:], atol=0.2)
    # Extrapolated from four classes.
    assert found.bias[0] - found.bias[4] == pytest.approx(expected[0], abs=0.5)


def test_the_loss_of_the_biases_has_the_gradient_it_says() -> None:
    logits, labels = calibrated(50)
    random = np.random.default_rng(1)
    loss = recalibration._bias_loss(logits, labels, random.normal(size=5), random.random(50), 0.7)
    point = random.normal(size=7)
    steps = 1e-6 * np.eye(7)
    numeric = [(loss(point + step)[0] - loss(point - step)[0]) / 2e-6 for step in steps]
    np.testing.assert_allclose(loss(point)[1], numeric, rtol=1e-6)


def test_a_large_penalty_leaves_a_temperature() -> None:
    logits, labels = calibrated(2000)
    found = fit_bias_correction(3 * logits, labels, np.ones(5), penalty=1e9)
    assert np.abs(found.bias).max() < 1e-5
    assert 1 / found.scale == pytest.approx(fit_temperature(3 * logits, labels), rel=0.05)


def fit_biases(logits: np.ndarray, labels: np.ndarray) -> object:
    return fit_bias_correction(logits, labels, np.ones(3))


@pytest.mark.parametrize("fit", [fit_temperature, fit_biases])
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


@pytest.mark.parametrize("counts", [[1, 2], [1, 0, 2]])
def test_training_counts_must_fit(counts: list[int]) -> None:
    with pytest.raises(UserError, match="3 positive training counts"):
        fit_bias_correction(np.zeros((2, 3)), [0, 1], counts)
