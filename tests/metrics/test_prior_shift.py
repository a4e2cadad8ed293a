# SPDX-License-Identifier: Apache-2.0
"""The test for a shifted class prior: its level, its power, and classes without examples."""

import numpy as np
import pytest
from scipy import stats

from balpoe_jax.metrics import prior_shift, prior_shift_p_value

NUM_CLASSES = 8
COUNTS = (400 * 0.01 ** np.linspace(0, 1, NUM_CLASSES)).astype(int)
# A classifier that is often wrong, and leans to the first classes.
CONFUSION = 0.4 * np.eye(NUM_CLASSES) + 0.6 * (np.arange(NUM_CLASSES)[::-1] + 1.0) / 36


def predict(random: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    return (random.random(len(labels))[:, None] > CONFUSION.cumsum(axis=1)[labels]).sum(axis=1)


def draw_p_values(prior: np.ndarray, held_out_counts: np.ndarray, times: int) -> np.ndarray:
    held_out_labels = np.repeat(np.arange(NUM_CLASSES), held_out_counts)
    values = []
    for seed in range(times):
        random = np.random.default_rng(seed)
        labels = random.choice(NUM_CLASSES, 1000, p=prior)
        predicted = predict(random, labels), predict(random, held_out_labels)
        values.append(prior_shift_p_value(*predicted, held_out_labels, COUNTS))
    return np.array(values)


@pytest.mark.parametrize("held_out_counts", [[40] * 8, [10, 20, 30, 40, 50, 60, 70, 80]])
def test_without_a_shift_the_level_is_kept(held_out_counts: list[int]) -> None:
    uniform = np.full(NUM_CLASSES, 1 / NUM_CLASSES)
    values = draw_p_values(uniform, np.array(held_out_counts), 300)
    for level in (0.01, 0.05, 0.2):
        # Three standard deviations of so many draws above the level.
        most = level + 3 * np.sqrt(level * (1 - level) / len(values))
        assert (values <= level).mean() <= most


def test_a_shift_is_found() -> None:
    prior = 10.0 ** -np.linspace(0, 1, NUM_CLASSES)
    assert (draw_p_values(prior / prior.sum(), np.full(8, 40), 50) <= 0.01).mean() > 0.9


def test_equal_weights_are_the_ordinary_chi_square_test() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(NUM_CLASSES), 50)
    predicted, held_out = predict(random, labels[:300]), predict(random, labels)
    table = [np.bincount(p, minlength=NUM_CLASSES) for p in (predicted, held_out)]
    expected = stats.chi2_contingency(table, correction=False).pvalue
    # Equal sizes have no trend.
    found = prior_shift_p_value(predicted, held_out, labels, np.full(NUM_CLASSES, 7))
    assert found == pytest.approx(min(1, 2 * expected))


def test_the_trend_is_an_ordinary_test_of_means() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(NUM_CLASSES), 50)
    predicted, held_out = predict(random, labels[:300]), predict(random, labels)
    table = np.stack([np.bincount(p, minlength=NUM_CLASSES) for p in (predicted, held_out)])
    sizes = np.log(COUNTS)
    expected = stats.ttest_ind(sizes[predicted], sizes[held_out], equal_var=False).pvalue
    found = prior_shift._trend_p_value(table.astype(float), sizes)
    assert found == pytest.approx(expected, rel=0.02)  # which has n - 1 and Student's t


def test_a_class_without_held_out_examples_says_nothing() -> None:
    """As the largest class, of which no training image is left."""
    random = np.random.default_rng(0)
    everything = np.repeat(np.arange(NUM_CLASSES), 100)
    held_out_labels = everything[everything > 0]
    values = [
        prior_shift_p_value(
            np.concatenate([np.zeros(extra, int), predict(random, everything[100:])]),
            predict(random, held_out_labels),
            held_out_labels,
            COUNTS,
        )
        for extra in (0, 1000)
    ]
    assert min(values) > 0.01


def test_rare_predictions_are_pooled() -> None:
    """Of many classes most are predicted once or never; without pooling a quarter is rejected."""
    shares = np.arange(1, 301) ** -1.5
    shares /= shares.sum()
    rejected = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        counts = [np.bincount(random.choice(300, n, p=shares), minlength=300) for n in (60, 3000)]
        rejected += prior_shift._homogeneity_p_value(np.stack(counts).astype(float)) <= 0.01
    assert rejected / 200 < 0.04


def test_nothing_to_compare() -> None:
    assert prior_shift_p_value([], [0, 1], [0, 1], [9, 5]) == 1.0
    assert prior_shift_p_value([2, 2, 2], [0, 1], [0, 1], [9, 5, 2]) == 1.0
