# SPDX-License-Identifier: Apache-2.0
"""Adjustment, temperature and thresholds after training, against loops and known truths."""

import math

import numpy as np
import pytest

from balpoe_jax.evaluation import posthoc
from balpoe_jax.evaluation.predictions import Predictions
from balpoe_jax.metrics import fit_temperature, softmax

COUNTS = np.array([600, 120, 30, 6])


def draw(number: int, tau: float, scale: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose exact adjustment is known: `scale * log p(class | x)` plus tau log-frequencies.

    The posterior is that under equal classes, from which labels are drawn.
    """
    random = np.random.default_rng(seed)
    evidence = random.normal(size=(number, 4)) * 1.5
    posterior = softmax(evidence)
    labels = np.array([random.choice(4, p=row) for row in posterior])
    return scale * evidence + tau * np.log(COUNTS / COUNTS.sum()), labels


def test_adjusting_is_the_formula() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    found = posthoc.adjust(logits, COUNTS, 0.7)
    for e, n, c in np.ndindex(logits.shape):
        expected = float(logits[e, n, c]) - 0.7 * math.log(COUNTS[c] / 756)
        assert found[e, n, c] == pytest.approx(expected, rel=1e-12)
    rows = posthoc.adjusted_predictions(Predictions(logits, np.zeros(5, int)), COUNTS, 0.7)
    np.testing.assert_allclose(rows.expert_logits, found, rtol=1e-6)


def test_tau_and_temperature_are_found() -> None:
    logits, labels = draw(20_000, tau=0.6, scale=2.0, seed=1)
    fitted = posthoc.fit(logits, labels, COUNTS)
    # Near its best value a tau costs less accuracy than the draw of the rows moves it.
    assert abs(fitted.tau - 0.6) < 0.15 and abs(fitted.temperature - 2) < 0.1
    for tau, score in zip(posthoc.TAUS[::8], fitted.scores[::8], strict=True):
        right = posthoc.adjust(logits, COUNTS, tau).argmax(axis=1) == labels
        assert score == pytest.approx(np.mean([right[labels == c].mean() for c in range(4)]))


def test_of_equally_good_taus_the_middle_one_is_taken() -> None:
    logits = 10 * np.eye(4)
    assert posthoc.fit(logits, np.arange(4), np.array([5, 5, 5, 5])).tau == 1.0


def test_a_class_without_held_out_rows_has_no_part() -> None:
    logits, labels = draw(4000, tau=1.0, scale=1.0, seed=2)
    kept = labels != 3
    fitted = posthoc.fit(logits[kept], labels[kept], COUNTS)
    right = posthoc.adjust(logits[kept], COUNTS, fitted.tau).argmax(axis=1) == labels[kept]
    mean = np.mean([right[labels[kept] == c].mean() for c in range(3)])
    assert fitted.scores.max() == pytest.approx(mean)


def test_variants_and_their_scores() -> None:
    held_out, held_out_labels = draw(5000, tau=1.0, scale=1.5, seed=3)
    test, labels = draw(4000, tau=1.0, scale=1.5, seed=4)
    fitted = posthoc.fit(held_out, held_out_labels, COUNTS)
    found = posthoc.variants(test, held_out, held_out_labels, COUNTS, fitted)
    plain = fit_temperature(held_out, held_out_labels)
    adjusted = posthoc.adjust(test, COUNTS, fitted.tau)
    np.testing.assert_allclose(found["as given"][2], softmax(test))
    np.testing.assert_allclose(found["temperature"][2], softmax(test / plain))
    np.testing.assert_allclose(found["adjusted"][2], softmax(adjusted))
    both = found["adjusted, temperature"]
    np.testing.assert_allclose(both[2], softmax(adjusted / fitted.temperature))
    assert both[:2] == (fitted.tau, fitted.temperature)
    scores = {row["name"]: row for row in posthoc.score_variants(found, labels, COUNTS, (20, 100))}
    for name, (_, _, probabilities) in found.items():
        row, predicted = scores[name], probabilities.argmax(axis=1)
        assert row["top1"] == pytest.approx(np.mean(predicted == labels))
        assert row["few"] == pytest.approx(np.mean(predicted[labels == 3] == 3))
        nll = -np.mean([math.log(p[y]) for p, y in zip(probabilities, labels, strict=True)])
        assert row["nll"] == pytest.approx(nll)
    assert scores["adjusted"]["balanced"] > scores["as given"]["balanced"] + 0.1
    assert scores["adjusted, temperature"]["ece"] < scores["adjusted"]["ece"] < 0.2
    # The test rows are balanced, so that there is nothing to estimate.
    assert abs(scores["and an estimated prior"]["top1"] - scores["adjusted"]["top1"]) < 0.01


def test_an_estimated_prior_helps_where_test_rows_are_uneven() -> None:
    held_out, held_out_labels = draw(5000, tau=1.0, scale=1.0, seed=5)
    test, labels = draw(9000, tau=1.0, scale=1.0, seed=6)
    random = np.random.default_rng(7)
    kept = random.uniform(size=9000) < np.array([1.0, 0.3, 0.1, 0.02])[labels]
    fitted = posthoc.fit(held_out, held_out_labels, COUNTS)
    found = posthoc.variants(test[kept], held_out, held_out_labels, COUNTS, fitted)
    rows = posthoc.score_variants(found, labels[kept], COUNTS, (20, 100))
    top1 = {row["name"]: row["top1"] for row in rows}
    assert top1["and an estimated prior"] > top1["adjusted, temperature"] + 0.05


def test_thresholds_on_test_rows_are_counted() -> None:
    held_out, held_out_labels = draw(3000, tau=0.0, scale=1.0, seed=8)
    test, labels = draw(2000, tau=0.0, scale=1.0, seed=9)
    rows = posthoc.score_thresholds(softmax(held_out), held_out_labels, softmax(test), labels)
    assert [row["precision"] for row in rows] == [0.8, 0.9, 0.95, 0.99]
    row, odds = rows[0], softmax(test)
    named = odds.max(axis=1) >= row["confidence"]
    assert row["test_coverage"] == pytest.approx(np.mean(named))
    assert row["test_precision"] == pytest.approx(
        np.mean(odds[named].argmax(axis=1) == labels[named])
    )
    assert row["held_out_precision"] >= 0.8 and abs(row["test_precision"] - 0.8) < 0.05
    hopeless = posthoc.score_thresholds(np.eye(4), np.array([1, 2, 3, 0]), np.eye(4), np.arange(4))
    assert all(row["confidence"] is None for row in hopeless)
