# SPDX-License-Identifier: Apache-2.0
"""Scores of a whole test set: against direct computation, in blocks, and what is refused."""

import numpy as np
import pytest

from balpoe_jax.data.datasets.test_distributions import make_targets
from balpoe_jax.errors import UserError
from balpoe_jax.evaluation import scoring
from balpoe_jax.evaluation.predictions import Predictions
from balpoe_jax.evaluation.priors import estimate_prior
from balpoe_jax.files import to_json
from balpoe_jax.metrics import (
    MeanLogits,
    brier_score,
    calibration,
    fit_bias_correction,
    negative_log_likelihood,
    shot_accuracy,
    softmax,
    summarize,
)
from balpoe_jax.metrics import summary as blocks
from balpoe_jax.reporting.result_tables import result_tables

COUNTS = np.array([300, 120, 50, 8])
TAUS = (0.0, 1.0, 2.0)


def draw(num_experts: int = 3, per_class: int = 50, seed: int = 0) -> Predictions:
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), per_class).astype(np.int32)
    logits = random.normal(size=(num_experts, len(labels), 4)).astype(np.float32)
    logits[:, np.arange(len(labels)), labels] += 1.5
    return Predictions(logits, labels)


@pytest.fixture(scope="module")
def test_set() -> Predictions:
    return draw()


@pytest.fixture(scope="module")
def scores(test_set: Predictions) -> dict:
    targets = make_targets(test_set.labels, COUNTS, (2, 50))
    held_out = draw(per_class=20, seed=1)
    return scoring.score(
        test_set, COUNTS, TAUS, held_out=held_out, held_out_description="drawn", targets=targets
    )


@pytest.mark.parametrize("numbers_a_block", [1, 13, 2**22])
@pytest.mark.parametrize("seed", range(3))
def test_a_summary_is_what_the_matrix_says(monkeypatch, numbers_a_block: int, seed: int) -> None:
    monkeypatch.setattr(blocks, "_NUMBERS_A_BLOCK", numbers_a_block)
    random = np.random.default_rng(seed)
    expert_logits = random.normal(size=(2, 30, 5)).astype(np.float32) * 4
    labels, offset = random.integers(0, 5, 30), random.normal(size=5)
    rows = random.permutation(30)[:17]
    summary = summarize(MeanLogits(expert_logits), labels, rows, scale=0.7, offset=offset)
    logits = 0.7 * expert_logits.astype(np.float64).mean(axis=0)[rows] + offset
    probabilities = softmax(logits)
    np.testing.assert_array_equal(summary.predicted, probabilities.argmax(axis=1))
    np.testing.assert_allclose(summary.confidence, probabilities.max(axis=1), rtol=1e-12)
    np.testing.assert_allclose(summary.marginal, probabilities.mean(axis=0), rtol=1e-12)
    assert summary.nll.mean() == pytest.approx(negative_log_likelihood(logits, labels[rows]))
    assert summary.brier.mean() == pytest.approx(brier_score(probabilities, labels[rows]))


def test_the_mean_of_some_experts() -> None:
    expert_logits = draw().expert_logits
    chosen = MeanLogits(expert_logits, (0, 2))
    np.testing.assert_allclose(chosen[3:9], expert_logits[[0, 2], 3:9].mean(axis=0), atol=1e-6)


def test_the_main_scores_are_those_of_the_mean_logits(scores: dict, test_set: Predictions) -> None:
    mean = test_set.expert_logits.astype(np.float64).mean(axis=0)
    accuracy = shot_accuracy(mean.argmax(axis=1), test_set.labels, COUNTS)
    bins = calibration(softmax(mean), test_set.labels)
    assert scores["test"]["top1"] == accuracy.all
    assert scores["test"]["few"] == accuracy.few
    assert scores["test"]["ece"] == pytest.approx(bins.ece, abs=1e-12)
    assert scores["test"]["mce"] == pytest.approx(bins.mce, abs=1e-12)
    assert scores["test"]["nll"] == pytest.approx(negative_log_likelihood(mean, test_set.labels))
    last = calibration(softmax(test_set.expert_logits[2]), test_set.labels)
    assert scores["experts"][2]["ece"] == pytest.approx(last.ece, abs=1e-6)


def test_calibration_by_group_is_that_of_its_examples(scores: dict, test_set: Predictions) -> None:
    probabilities = softmax(test_set.expert_logits.astype(np.float64).mean(axis=0))
    for group, members in {"many": [0, 1], "medium": [2], "few": [3]}.items():
        rows = np.isin(test_set.labels, members)
        bins = calibration(probabilities[rows], test_set.labels[rows])
        found = scores["calibration_groups"]["ensemble"][group]
        assert found["ece"] == pytest.approx(bins.ece, abs=1e-12)
        assert found["brier"] == pytest.approx(
            brier_score(probabilities[rows], test_set.labels[rows])
        )


def test_a_target_is_scored_on_its_examples(scores: dict, test_set: Predictions) -> None:
    forward = make_targets(test_set.labels, COUNTS, (2, 50))[0]
    mean = test_set.expert_logits.astype(np.float64).mean(axis=0)[forward.indices]
    labels = test_set.labels[forward.indices]
    prior = np.bincount(labels, minlength=4) / len(labels)
    found = scores["shift"]["forward50"]
    assert found["none"] == (mean.argmax(axis=1) == labels).mean()
    assert found["prior"] == ((mean + np.log(prior)).argmax(axis=1) == labels).mean()
    details = scores["shift_sets"]["forward50"]
    assert details["num_examples"] == len(labels)
    assert details["estimate_used"]
    assert details["estimates"]["map"]["top1"] == found["estimated"]
    assert details["l1_of_uniform"] == pytest.approx(np.abs(prior - 0.25).sum())


def test_the_uniform_target_is_the_test_set(scores: dict) -> None:
    uniform = scores["shift"]["uniform"]
    assert uniform["none"] == uniform["prior"] == scores["test"]["top1"]
    assert scores["shift_sets"]["uniform"]["l1_of_uniform"] == 0


def test_where_the_prior_does_not_shift_no_estimate_is_used(scores: dict) -> None:
    details = scores["shift_sets"]["uniform"]
    assert details["shift_p_value"] > 0.01 and not details["estimate_used"]
    assert scores["shift"]["uniform"]["estimated"] == scores["shift"]["uniform"]["none"]
    assert details["ece"]["estimated"] == details["ece"]["none"]


def test_every_estimate_is_used_when_no_significance_is_asked_for(test_set: Predictions) -> None:
    targets = make_targets(test_set.labels, COUNTS, (2,))
    options = {"held_out": draw(per_class=20, seed=1), "targets": targets}
    found = scoring.score(test_set, COUNTS, TAUS, shift_test_level=1.0, **options)
    for name, details in found["shift_sets"].items():
        assert details["estimate_used"]
        assert found["shift"][name]["estimated"] == details["estimates"]["map"]["top1"]


@pytest.mark.parametrize("corrected", [False, True])
def test_a_prior_is_estimated_from_the_examples_of_its_target(
    test_set: Predictions, corrected: bool
) -> None:
    """A second derivation, from the target's own rows."""
    held_out = draw(per_class=20, seed=1)
    target = make_targets(test_set.labels, COUNTS, (50,))[2]
    found = scoring.score(
        test_set,
        COUNTS,
        TAUS,
        held_out=held_out if corrected else None,
        targets=[target],
        prior_strength=0.5,
    )["shift_sets"]["backward50"]
    logits = test_set.expert_logits.astype(np.float64).mean(axis=0)[target.indices]
    correction = fit_bias_correction(
        held_out.expert_logits.astype(np.float64).mean(axis=0), held_out.labels, COUNTS
    )
    raw, better = softmax(logits), softmax(logits * correction.scale + correction.bias)
    concentration = 1 + 0.5 * len(logits) / 4
    expected = {
        "map": estimate_prior(better if corrected else raw, concentration=concentration),
        "ml": estimate_prior(better if corrected else raw),
    }
    if corrected:
        expected["map_uncorrected"] = estimate_prior(raw, concentration=concentration)
    assert set(found["estimates"]) == set(expected)
    for name, estimate in expected.items():
        distance = np.abs(np.asarray(estimate.prior) - target.prior).sum()
        assert found["estimates"][name]["l1"] == pytest.approx(distance, abs=1e-5)
        predicted = (logits + np.log(np.asarray(estimate.prior) + 1e-9)).argmax(axis=1)
        accuracy = (predicted == test_set.labels[target.indices]).mean()
        assert found["estimates"][name]["top1"] == pytest.approx(accuracy)


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_estimates_survive_a_bias_to_frequent_classes(strength: float) -> None:
    """As cross-entropy has it, and with no held-out image of the largest class."""
    counts = (500 * 0.01 ** np.linspace(0, 1, 20)).astype(int)
    random = np.random.default_rng(0)

    def draw_biased(labels: np.ndarray) -> Predictions:
        logits = random.normal(size=(len(labels), 20)) + 4 * np.eye(20)[labels] + np.log(counts)
        return Predictions(logits[None].astype(np.float32), labels.astype(np.int32))

    held_out = draw_biased(np.repeat(np.arange(1, 20), 20))
    test_set = draw_biased(np.repeat(np.arange(20), 50))
    found = scoring.score(
        test_set,
        counts,
        (0.0,),
        held_out=held_out,
        targets=make_targets(test_set.labels, counts, (10,)),
        prior_strength=strength,
    )
    for details in found["shift_sets"].values():
        assert details["estimates"]["map"]["l1"] < 0.3
    assert found["shift"]["uniform"]["estimated"] == found["shift"]["uniform"]["none"]


def test_an_estimate_says_whether_it_has_converged(monkeypatch, test_set: Predictions) -> None:
    targets = make_targets(test_set.labels, COUNTS, (50,))

    def estimate_in_two_rounds(*arguments, **options):
        return estimate_prior(*arguments, **options, max_rounds=2)

    finished = scoring.score(test_set, COUNTS, TAUS, targets=targets)["shift_sets"]["forward50"]
    monkeypatch.setattr(scoring, "estimate_prior", estimate_in_two_rounds)
    stopped = scoring.score(test_set, COUNTS, TAUS, targets=targets)["shift_sets"]["forward50"]
    assert finished["estimates"]["map"]["converged"]
    assert finished["estimates"]["map"]["change"] < 1e-6
    assert not stopped["estimates"]["map"]["converged"]
    assert stopped["estimates"]["map"]["change"] > 1e-3


def test_an_estimate_finds_more_than_a_uniform_prior_on_a_shifted_set(scores: dict) -> None:
    for name in ("forward50", "backward50"):
        details = scores["shift_sets"][name]
        assert details["estimates"]["map"]["l1"] < details["l1_of_uniform"]


def test_temperatures_improve_the_likelihood_where_they_are_fitted(test_set: Predictions) -> None:
    sharpened = Predictions(test_set.expert_logits * 5, test_set.labels)
    found = scoring.score(sharpened, COUNTS, TAUS, held_out=sharpened)
    after = found["temperature"]["ensemble"]
    assert after["value"] > 1
    assert after["nll"] < found["test"]["nll"]
    for expert, before in zip(found["temperature"]["experts"], found["experts"], strict=True):
        assert expert["nll"] < before["nll"]


def test_without_held_out_examples_nothing_is_fitted(test_set: Predictions) -> None:
    targets = make_targets(test_set.labels, COUNTS, (2,))
    found = scoring.score(test_set, COUNTS, TAUS, targets=targets)
    assert found["temperature"] is None and found["held_out"] is None
    assert found["shift_sets"]["forward2"]["shift_p_value"] is None
    assert found["shift_sets"]["forward2"]["estimate_used"]
    assert set(found["shift_sets"]["forward2"]["estimates"]) == {"map", "ml"}


def test_held_out_examples_are_scored_as_the_test_set_is(scores: dict) -> None:
    held_out = draw(per_class=20, seed=1)
    expected = scoring.score_test(held_out, COUNTS, TAUS)["test"]
    assert scores["held_out"] == {"num_examples": len(held_out.labels), **expected}


def test_subsets_of_experts(scores: dict, test_set: Predictions) -> None:
    subsets = {tuple(s["experts"]): s for s in scores["ensemble"]["subsets"]}
    assert list(subsets) == [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)]
    assert subsets[1, 2, 3]["top1"] == scores["test"]["top1"]
    assert subsets[2,]["top1"] == scores["experts"][1]["top1"]
    assert subsets[1, 3]["mean_tau"] == 1
    mean = test_set.expert_logits[[0, 2]].astype(np.float64).mean(axis=0)
    assert subsets[1, 3]["top1"] == (mean.argmax(axis=1) == test_set.labels).mean()
    mean_expert = np.mean([expert["top1"] for expert in scores["experts"]])
    assert scores["ensemble"]["gain"] == pytest.approx(scores["test"]["top1"] - mean_expert)


def test_many_experts_have_a_bounded_number_of_subsets() -> None:
    subsets = scoring._subsets(12)
    assert len(subsets) < 12 * 36
    assert subsets[-1] == tuple(range(12))
    assert len(subsets) == len(set(subsets))


def test_bias_is_the_divergence_from_the_target_prior(scores: dict, test_set: Predictions) -> None:
    marginal = softmax(test_set.expert_logits[2].astype(np.float64)).mean(axis=0)
    target = (1 / COUNTS) / (1 / COUNTS).sum()  # tau 2 is lambda -1
    expected = np.sum(target * np.log(target / marginal))
    assert scores["bias"]["experts"][2]["lambda"] == -1
    assert scores["bias"]["experts"][2]["kl"] == pytest.approx(expected)


def test_disagreement(scores: dict, test_set: Predictions) -> None:
    first, second = test_set.expert_logits[:2].argmax(axis=2)
    found = scores["ensemble"]["disagreement"]
    assert found[0][1] == found[1][0] == (first != second).mean()
    assert np.diagonal(found).tolist() == [0, 0, 0]


def test_one_expert_has_no_one_to_disagree_with() -> None:
    found = scoring.score(draw(num_experts=1), COUNTS, (0.0,))
    assert np.isnan(found["ensemble"]["mean_disagreement"])
    assert found["ensemble"]["gain"] == 0


def test_an_empty_group_is_undefined() -> None:
    found = scoring.score(draw(), np.array([300, 200, 150, 120]), TAUS)
    assert np.isnan(found["calibration_groups"]["ensemble"]["few"]["ece"])
    assert np.isnan(found["group_confusion"][2]).all()


def test_logits_that_are_not_finite_are_refused() -> None:
    test_set = draw()
    test_set.expert_logits[1, 7, 2] = np.nan
    with pytest.raises(UserError, match="logits of 1 of 200 examples are not finite"):
        scoring.score(test_set, COUNTS, TAUS)


def test_how_many_experts_were_asked_is_told(test_set: Predictions, scores: dict) -> None:
    """By a method that asks as many as it needs, with the accuracy of what they say together."""
    used = np.tile(np.array([1, 3], np.float32), len(test_set.labels) // 2)
    combined = np.where(used[:, None] == 1, test_set.expert_logits[0], test_set.ensemble[:])
    routed = Predictions(*test_set[:2], combined.astype(np.float32), used)
    found = scoring.score(routed, COUNTS, TAUS)
    assert found["experts_used"] == 2.0
    assert "experts_used" not in scores
    expected = (combined.argmax(axis=1) == test_set.labels).mean()
    assert found["test"]["top1"] == expected != scores["test"]["top1"]
    table = {table.name: table for table in result_tables(to_json(found))}["experts"]
    name, values = table.rows[-1]
    assert (name, values[0]) == ("2.00 asked", expected)
    assert "as many experts for each image as it needs" in table.note
