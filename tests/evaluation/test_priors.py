# SPDX-License-Identifier: Apache-2.0
"""Known priors as in the reference; estimated ones against truth and a second derivation."""

import numpy as np
import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.evaluation.priors import estimate_prior, log_target_prior
from balpoe_jax.metrics import MeanLogits, softmax, summarize
from tests.helpers.golden import cases, golden


def calibrated_examples(
    prior: np.ndarray, num_examples: int, separation: float = 3.0, seed: int = 0
) -> np.ndarray:
    """Posteriors under a uniform prior, exactly calibrated, of examples drawn with `prior`.

    Class means are orthogonal and noise is normal, so that the posterior is a softmax of known
    logits.
    """
    random = np.random.default_rng(seed)
    labels = random.choice(len(prior), num_examples, p=prior)
    signal = separation * np.eye(len(prior))[labels] + random.normal(
        size=(num_examples, len(prior))
    )
    return softmax(separation * signal)


def loop_estimate(probabilities: np.ndarray, concentration: float, rounds: int) -> np.ndarray:
    """The same rounds example by example, in double precision."""
    num_examples, num_classes = probabilities.shape
    prior = np.full(num_classes, 1 / num_classes)
    for _ in range(rounds):
        expected = np.zeros(num_classes)
        for row in probabilities:
            expected += row * prior / np.sum(row * prior)
        prior = (expected + concentration - 1) / (num_examples + num_classes * (concentration - 1))
    return prior


@pytest.mark.parametrize("name", cases("posthoc"))
def test_predictions_with_a_known_prior_are_the_references(name: str) -> None:
    case = golden(f"posthoc/{name}")
    logits, labels = MeanLogits(case["expert_logits"]), case["labels"]
    prior = case["test_counts"] / case["test_counts"].sum()
    plain = summarize(logits, labels)
    adjusted = summarize(logits, labels, offset=log_target_prior(prior, logits.shape[1]))
    np.testing.assert_array_equal(plain.predicted, case["plain_pred"])
    np.testing.assert_array_equal(adjusted.predicted, case["adjusted_pred"])
    assert (plain.predicted != adjusted.predicted).any()


def test_a_uniform_prior_changes_nothing() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 6))
    labels = np.zeros(50, int)
    offset = log_target_prior(np.full(6, 1 / 6), 6)
    before, after = summarize(logits, labels), summarize(logits, labels, offset=offset)
    np.testing.assert_array_equal(before.predicted, after.predicted)
    np.testing.assert_allclose(before.confidence, after.confidence, atol=1e-12)


@pytest.mark.parametrize("ratio", [1, 10, 100])
@pytest.mark.parametrize("seed", range(3))
def test_a_known_prior_is_recovered_within_sampling_error(ratio: float, seed: int) -> None:
    num_classes, num_examples = 10, 20_000
    prior = ratio ** -(np.arange(num_classes) / (num_classes - 1))
    prior /= prior.sum()
    probabilities = calibrated_examples(prior, num_examples, seed=seed)
    estimate = estimate_prior(probabilities)
    # What counting the labels themselves would give is off by this much, and the classifier,
    # which is right nine times in ten, by not much more.
    sampling = np.sqrt(prior * (1 - prior) / num_examples).sum()
    assert np.abs(np.asarray(estimate.prior) - prior).sum() < 3 * sampling
    assert estimate.change < 1e-6


@pytest.mark.parametrize("concentration", [1.0, 1.5, 20.0])
def test_rounds_are_those_of_a_loop(concentration: float) -> None:
    prior = np.array([0.6, 0.3, 0.08, 0.02])
    probabilities = calibrated_examples(prior, 300, separation=1.5)
    estimate = estimate_prior(
        probabilities, concentration=concentration, tolerance=0, max_rounds=12
    )
    assert estimate.rounds == 12
    expected = loop_estimate(probabilities, concentration, 12)
    np.testing.assert_allclose(estimate.prior, expected, rtol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_an_estimate_is_a_distribution_whatever_comes_in(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = random.integers(1, 40), random.integers(1, 30)
    probabilities = softmax(random.normal(size=shape) * random.choice([0.1, 5, 80]))
    weights = random.random(shape[0]) * random.integers(0, 2, shape[0])
    weights[0] += 0.1
    for concentration in (1.0, 2.0):
        prior = np.asarray(estimate_prior(probabilities, weights, concentration).prior)
        assert prior.min() >= 0
        assert prior.sum() == pytest.approx(1, abs=1e-5)


def test_weights_are_repetitions() -> None:
    probabilities = calibrated_examples(np.array([0.7, 0.2, 0.1]), 40, separation=1.0)
    repeats = np.random.default_rng(0).integers(0, 4, 40)
    weighted = estimate_prior(probabilities, repeats, 1.5)
    repeated = estimate_prior(np.repeat(probabilities, repeats, axis=0), concentration=1.5)
    np.testing.assert_allclose(weighted.prior, repeated.prior, atol=1e-5)


def test_more_concentration_leans_to_uniform() -> None:
    probabilities = calibrated_examples(np.array([0.9, 0.06, 0.04]), 500)
    distances = [
        np.abs(np.asarray(estimate_prior(probabilities, concentration=a).prior) - 1 / 3).sum()
        for a in (1, 10, 100, 1e6)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3


def test_classes_that_are_never_predicted_are_survived() -> None:
    probabilities = np.zeros((200, 5))
    probabilities[:150, 0] = probabilities[150:, 3] = 1
    estimate = estimate_prior(probabilities)
    np.testing.assert_allclose(estimate.prior, [0.75, 0, 0, 0.25, 0], atol=1e-6)
    offset = log_target_prior(estimate.prior, 5)
    assert np.isfinite(offset).all()


def test_an_example_that_does_not_count_may_be_of_a_class_of_its_own() -> None:
    estimate = estimate_prior(np.eye(3)[[0, 0, 1, 2]], [1, 1, 1, 0])
    np.testing.assert_allclose(estimate.prior, [2 / 3, 1 / 3, 0], atol=1e-6)


@pytest.mark.integration
def test_many_classes_with_few_examples_each_converge() -> None:
    """As many classes as iNaturalist 2018, fewer examples than classes."""
    num_classes, num_examples = 8142, 3000
    random = np.random.default_rng(0)
    prior = random.exponential(size=num_classes)
    prior /= prior.sum()
    labels = random.choice(num_classes, num_examples, p=prior)
    logits = random.normal(size=(num_examples, num_classes)).astype(np.float32)
    logits[np.arange(num_examples), labels] += 14
    probabilities = softmax(logits)
    estimate = estimate_prior(probabilities)
    assert estimate.change < 1e-6
    assert estimate.rounds < 200
    counted = np.bincount(labels, minlength=num_classes) / num_examples
    assert np.abs(np.asarray(estimate.prior) - counted).sum() < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(3),), r"probabilities \[N, C\]"),
        ((np.zeros((0, 3)),), "N >= 1"),
        ((np.ones((2, 3)), np.ones(3)), r"weights \[2\]"),
        ((np.array([[0.5, np.nan]]),), "finite and not negative"),
        ((np.array([[1.5, -0.5]]),), "finite and not negative"),
        ((np.array([[0.0, 0.0]]),), "something positive"),
        ((np.ones((2, 3)), np.zeros(2)), "something positive"),
        ((np.ones((2, 3)), None, 0.5), "at least 1, got 0.5"),
    ],
)
def test_estimation_refuses(arguments, message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimate_prior(*arguments)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([0.5, 0.5], "each of the 3 classes"),
        ([0.5, 0.8, -0.3], "minimum of -0.3"),
        ([1.0, 2.0, 3.0], "sum of 6"),
        ([np.nan, 0.5, 0.5], "sum of nan"),
    ],
)
def test_a_known_prior_must_fit(prior, message: str) -> None:
    with pytest.raises(UserError, match=message):
        log_target_prior(prior, 3)


@pytest.mark.parametrize("concentration", [np.nan, np.inf, 1e38, 1e300])
def test_a_concentration_out_of_range_is_refused(concentration: float) -> None:
    with pytest.raises(UserError, match="concentration must be at"):
        estimate_prior(np.full((4, 2), 0.5), concentration=concentration)


def test_the_largest_concentration_is_uniform() -> None:
    probabilities = np.tile([0.9, 0.1], (4, 1))
    np.testing.assert_allclose(estimate_prior(probabilities, concentration=8e37).prior, 0.5)
