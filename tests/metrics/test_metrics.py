# SPDX-License-Identifier: Apache-2.0
"""Accuracy and calibration: the reference's numbers, edges of bins, and a second derivation."""

import itertools

import numpy as np
import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.metrics import (
    adaptive_calibration_error,
    bin_confidences,
    brier_score,
    calibration,
    disagreement,
    kl_divergence,
    negative_log_likelihood,
    shot_accuracy,
    shot_confusion,
    shot_groups,
    softmax,
    target_prior,
)
from tests.helpers.golden import cases, golden


@pytest.mark.parametrize("name", cases("calibration"))
def test_calibration_is_the_references(name: str) -> None:
    case = golden(f"calibration/{name}")
    probabilities = case["probs"] if "probs" in case else softmax(case["logits"])
    result = calibration(probabilities, case["labels"], int(case["n_bins"]))
    for ours, theirs in (
        (result.ece, "ece"),
        (result.mce, "mce"),
        (result.bin_accuracy, "bin_acc"),
        (result.bin_confidence, "bin_conf"),
        (result.bin_fraction, "bin_prop"),
    ):
        np.testing.assert_allclose(ours, case[theirs], rtol=0, atol=1e-10, err_msg=theirs)


@pytest.mark.parametrize("name", cases("shot"))
def test_shot_accuracies_are_the_references(name: str) -> None:
    case = golden(f"shot/{name}")
    result = shot_accuracy(case["pred"], case["labels"], case["train_counts"])
    assert result.all == pytest.approx(case["accuracy"], abs=1e-6)
    for group in ("many", "medium", "few"):
        expected = float(case[f"{group}_acc"])
        assert getattr(result, group) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_per_class_accuracies_are_the_references() -> None:
    case = golden("calibration/c10_imbalanced_labels")
    predictions = case["logits"].argmax(axis=1)
    result = shot_accuracy(predictions, case["labels"], case["train_counts"])
    np.testing.assert_allclose(result.per_class, case["per_class_acc"], atol=1e-6)
    assert result.all == pytest.approx(case["overall_acc"], abs=1e-6)


def draw_predictions(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Probabilities, labels and a number of bins, each of any size."""
    random = np.random.default_rng(seed)
    num_examples, num_classes = random.integers(1, 300), random.integers(2, 12)
    logits = random.normal(size=(num_examples, num_classes)) * random.choice([0.1, 1, 5])
    labels = random.integers(0, num_classes, num_examples)
    return softmax(logits), labels, int(random.integers(1, 25))


@pytest.mark.parametrize("seed", range(12))
def test_calibration_by_a_loop_over_examples(seed: int) -> None:
    probabilities, labels, num_bins = draw_predictions(seed)
    gaps = []
    for low in range(num_bins):
        members = [
            i for i, p in enumerate(probabilities.max(axis=1)) if low < p * num_bins <= low + 1
        ]
        if members:
            confidence = probabilities[members].max(axis=1).mean()
            accuracy = (probabilities[members].argmax(axis=1) == labels[members]).mean()
            gaps.append((len(members) / len(labels), abs(accuracy - confidence)))
    result = calibration(probabilities, labels, num_bins)
    assert result.ece == pytest.approx(sum(share * gap for share, gap in gaps), abs=1e-12)
    assert result.mce == pytest.approx(max(gap for _, gap in gaps), abs=1e-12)
    assert 0 <= result.ece <= result.mce <= 1
    assert result.bin_fraction.sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(12))
def test_adaptive_bins_by_sorting_and_cutting(seed: int) -> None:
    """Without ties, bins are consecutive pieces of the sorted examples."""
    probabilities, labels, num_bins = draw_predictions(seed)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    expected = 0.0
    assert len(np.unique(confidence)) == len(confidence)
    order = np.argsort(confidence)
    cuts = [-(-(k * len(order)) // num_bins) for k in range(num_bins + 1)]
    for low, high in itertools.pairwise(cuts):
        piece = order[low:high]
        if len(piece):
            expected += abs(correct[piece].sum() - confidence[piece].sum()) / len(order)
    found = adaptive_calibration_error(confidence, correct, num_bins)
    assert found == pytest.approx(expected, abs=1e-12)


def test_adaptive_bins_do_not_depend_on_the_order_of_ties() -> None:
    confidence = np.array([0.5, 0.5, 0.5, 0.5, 0.9, 0.9])
    correct = np.array([True, False, False, False, True, True])
    one = adaptive_calibration_error(confidence, correct, 3)
    two = adaptive_calibration_error(confidence[::-1], correct[::-1], 3)
    assert one == pytest.approx(two) == pytest.approx((4 * 0.25 + 2 * 0.1) / 6)


def test_one_bin_is_the_gap_of_the_means() -> None:
    confidence, correct = np.array([0.6, 0.9, 0.3]), np.array([True, True, False])
    expected = 2 / 3 - 0.6
    assert bin_confidences(confidence, correct, 1).ece == pytest.approx(expected)
    assert adaptive_calibration_error(confidence, correct, 1) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_brier_score_by_its_definition(seed: int) -> None:
    probabilities, labels, _ = draw_predictions(seed)
    one_hot = np.eye(probabilities.shape[1])[labels]
    expected = ((probabilities - one_hot) ** 2).sum(axis=1).mean()
    assert brier_score(probabilities, labels) == pytest.approx(expected)


def test_brier_score_at_its_ends() -> None:
    assert brier_score([[1.0, 0.0]], [0]) == 0
    assert brier_score([[1.0, 0.0]], [1]) == 2


def test_confusion_between_groups() -> None:
    counts = [500, 200, 50, 5]
    confusion = shot_confusion([0, 1, 2, 3, 3, 0], [0, 0, 0, 1, 2, 3], counts)
    np.testing.assert_allclose(confusion, [[0.5, 0.25, 0.25], [0, 0, 1], [1, 0, 0]])
    assert np.isnan(shot_confusion([0], [0], counts)[1:]).all()


def test_disagreement_of_experts() -> None:
    found = disagreement([[0, 1, 2, 3], [0, 1, 2, 0], [3, 2, 1, 0]])
    np.testing.assert_allclose(found, [[0, 0.25, 1], [0.25, 0, 0.75], [1, 0.75, 0]])


def test_target_priors() -> None:
    counts = np.array([60, 30, 10])
    np.testing.assert_allclose(target_prior(counts, 0), [0.6, 0.3, 0.1])
    np.testing.assert_allclose(target_prior(counts, 1), [1 / 3] * 3)
    inverse = np.array([1 / 6, 1 / 3, 1])
    np.testing.assert_allclose(target_prior(counts, 2), inverse / inverse.sum())
    with pytest.raises(UserError, match="all positive"):
        target_prior([1, 0], 1)


def test_divergence() -> None:
    assert kl_divergence([0.5, 0.5], [0.5, 0.5]) == 0
    assert kl_divergence([1, 0], [0.25, 0.75]) == pytest.approx(np.log(4))
    assert kl_divergence([0.5, 0.5], [1, 0]) == np.inf
    with pytest.raises(UserError, match="one length"):
        kl_divergence([1.0], [0.5, 0.5])


def test_certain_and_right_is_perfect_and_certain_and_wrong_is_worst() -> None:
    certain = np.eye(3)[[0, 1, 2, 0]]
    right = calibration(certain, [0, 1, 2, 0])
    wrong = calibration(certain, [1, 2, 0, 1])
    assert (right.ece, right.mce) == (0, 0)
    assert (wrong.ece, wrong.mce) == (1, 1)
    assert right.bin_fraction[-1] == 1


def test_a_confidence_on_an_edge_belongs_below_it() -> None:
    result = calibration([[0.5, 0.5]], [0], num_bins=2)
    np.testing.assert_array_equal(result.bin_fraction, [1, 0])


def test_rounding_above_one_is_not_lost() -> None:
    result = calibration([[1 + 1e-8, 0.0], [0.75, 0.25]], [0, 1], num_bins=4)
    np.testing.assert_array_equal(result.bin_fraction, [0, 0, 0.5, 0.5])


def test_shot_groups_at_their_thresholds() -> None:
    groups = shot_groups([101, 100, 20, 19])
    np.testing.assert_array_equal(groups.many, [True, False, False, False])
    np.testing.assert_array_equal(groups.medium, [False, True, True, False])
    np.testing.assert_array_equal(groups.few, [False, False, False, True])


def test_an_empty_group_is_nan_and_leaves_the_rest_alone() -> None:
    result = shot_accuracy([0, 1, 1], [0, 1, 0], [500, 500])
    assert np.isnan(result.medium)
    assert np.isnan(result.few)
    assert result.balanced == pytest.approx(0.75)
    assert result.all == pytest.approx(2 / 3)


def test_a_class_without_test_examples_is_left_out() -> None:
    result = shot_accuracy([0, 0], [0, 0], [500, 5])
    assert (result.many, result.balanced) == (1, 1)
    assert np.isnan(result.few)
    assert np.isnan(result.per_class[1])


def test_balanced_is_all_on_a_balanced_set() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 20)
    result = shot_accuracy(random.integers(0, 5, 100), labels, [500, 200, 50, 30, 5])
    assert result.balanced == pytest.approx(result.all)


def test_negative_log_likelihood_survives_what_a_probability_does_not() -> None:
    logits = np.array([[0.0, -2000.0], [3.0, 1.0]])
    expected = (2000 + np.log1p(np.exp(2.0))) / 2
    assert negative_log_likelihood(logits, [1, 1]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[2.0, -1.0]], [0], "pass logits through softmax"),
        ([[np.nan, 0.5]], [0], "must lie in"),
        ([[0.5, 0.5]], [0, 1], r"shapes \(1, 2\) and \(2,\)"),
        (np.zeros((0, 2)), [], "N >= 1"),
    ],
)
def test_calibration_refuses(probabilities, labels, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibration(probabilities, labels)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1], [0], "one length"),
        ([], [], "at least 1"),
        ([0, 0], [0, 2], r"0\.\.1 for 2 train_counts"),
        ([0, 0], [0, -1], r"0\.\.1 for 2 train_counts"),
    ],
)
def test_shot_accuracy_refuses(predictions, labels, message: str) -> None:
    with pytest.raises(UserError, match=message):
        shot_accuracy(np.array(predictions, int), np.array(labels, int), [5, 500])
