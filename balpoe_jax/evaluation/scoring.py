# SPDX-License-Identifier: Apache-2.0
"""The scores of a run's predictions: arrays in, the content of results.json out."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from balpoe_jax import metrics
from balpoe_jax.data.datasets.test_distributions import TestDistribution
from balpoe_jax.evaluation.expert_weights import Aggregation
from balpoe_jax.evaluation.predictions import Predictions, summarize_experts
from balpoe_jax.evaluation.priors import (
    TOLERANCE,
    PriorEstimate,
    concentration,
    estimate_prior,
    log_target_prior,
)
from balpoe_jax.metrics import Correction, MeanLogits, Summary, summarize

GROUPS = ("many", "medium", "few")

# More than seven experts have too many subsets; at most this many of each size are scored.
_SUBSETS_A_SIZE = 35


def score(
    test: Predictions,
    class_counts: npt.NDArray[np.int64],
    taus: Sequence[float | None],
    *,
    num_bins: int = 15,
    thresholds: tuple[int, int] = metrics.DEFAULT_THRESHOLDS,
    held_out: Predictions | None = None,
    held_out_description: str = "",
    targets: Sequence[TestDistribution] = (),
    prior_strength: float = 0.3,
    shift_test_level: float = 0.01,
) -> dict[str, Any]:
    """Makes all scores of the ensemble and of each expert.

    The ensemble is the softmax of the mean of the experts' raw logits, or of the logits that the
    method made of them (`Predictions.combined`). On a target distribution it predicts in three
    ways: without a prior; with the known class frequencies as a prior, whose logarithm is added to
    the mean logits; and with a prior that expectation-maximisation estimates from the unlabelled
    examples.

    Before estimating, the probabilities are corrected by a temperature and class biases fitted on
    `held_out`, where there is one; the correction serves the estimate alone. The estimate is used
    only where the predictions show that the target's prior is not uniform, so that it does no harm
    where there is nothing to estimate.

    Args:
        test: Predictions on the test set.
        class_counts: Numbers of training examples by class, `[C]`.
        taus: Tau of each expert, `[E]`; None for an expert whose loss has none.
        num_bins: Number of bins of the calibration errors.
        thresholds: Thresholds of the shot groups.
        held_out: Predictions on labelled examples outside training and test set; None for no
            temperature scaling and no correction.
        held_out_description: Origin of the held-out examples, for the record.
        targets: Target distributions.
        prior_strength: Weight of the uniform prior against the examples in the estimate: the
            concentration is `1 + strength * M / C` for `M` examples and `C` classes, 0 is maximum
            likelihood.
        shift_test_level: Level of the test (`metrics.prior_shift_p_value`) that a target must
            fail for its estimate to be used; 1 uses every estimate. Without `held_out` there is no
            test and every estimate is used.

    Returns:
        All of `results.json` but the run's own numbers: `class_counts`, `num_bins`, `test`,
        `experts`, `experts_used` (their mean number, where a method does not always take all),
        `group_confusion`, `calibration_groups`, `ensemble`, `bias`, `held_out`,
        `temperature`, `shift` and `shift_sets`; fractions in [0, 1], nan where undefined.

    Raises:
        UserError (a `ValueError`): logits that are not finite.
    """
    basic, ensemble, experts = _score_test(test, class_counts, taus, num_bins, thresholds)
    if held_out is not None:
        metrics.check_finite(held_out.ensemble, what="held-out examples")
    options = (test.labels, class_counts, num_bins, thresholds)
    evidence = _evidence_of_priors(test, held_out, class_counts) if targets else {}
    shift_test = _shift_test(held_out, class_counts) if held_out and targets else None
    sets = {
        target.name: _score_target(
            test,
            target,
            evidence,
            shift_test,
            prior_strength,
            shift_test_level,
            num_bins,
        )
        for target in targets
    }
    return {
        **basic,
        "num_bins": num_bins,
        "calibration_groups": {
            "ensemble": _calibration_by_group(ensemble, *options),
            "experts": [_calibration_by_group(expert, *options) for expert in experts],
        },
        "ensemble": _score_ensemble(test, class_counts, taus, experts, thresholds),
        "bias": _score_bias(class_counts, taus, ensemble, experts),
        "held_out": _score_held_out(held_out, *options[1:]),
        "temperature": _score_temperature(test, held_out, held_out_description, *options[1:]),
        "shift": {name: scores.pop("top1") for name, scores in sets.items()},
        "shift_sets": sets,
    }


def score_test(
    test: Predictions,
    class_counts: npt.NDArray[np.int64],
    taus: Sequence[float | None],
    num_bins: int = 15,
    thresholds: tuple[int, int] = metrics.DEFAULT_THRESHOLDS,
) -> dict[str, Any]:
    """`class_counts`, `test`, `experts`, `group_confusion` and `experts_used` of `score` alone."""
    return _score_test(test, class_counts, taus, num_bins, thresholds)[0]


def _score_test(
    test: Predictions,
    class_counts: npt.NDArray[np.int64],
    taus: Sequence[float | None],
    num_bins: int,
    thresholds: tuple[int, int],
) -> tuple[dict[str, Any], Summary, list[Summary]]:
    ensemble, experts = summarize_experts(test)
    options = (test.labels, class_counts, num_bins, thresholds)
    confusion = metrics.shot_confusion(ensemble.predicted, test.labels, class_counts, thresholds)
    scores: dict[str, Any] = {
        "class_counts": class_counts,
        "test": _score_classifier(ensemble, *options),
        "experts": [
            {"tau": tau, **_score_classifier(expert, *options)}
            for tau, expert in zip(taus, experts, strict=True)
        ],
        "group_confusion": confusion,
    }
    if test.experts_used is not None:
        scores["experts_used"] = float(np.mean(test.experts_used, dtype=np.float64))
    return scores, ensemble, experts


def _score_classifier(
    summary: Summary,
    labels: npt.NDArray[np.int32],
    class_counts: npt.NDArray[np.int64],
    num_bins: int,
    thresholds: tuple[int, int],
) -> dict[str, Any]:
    accuracy = metrics.shot_accuracy(summary.predicted, labels, class_counts, thresholds)
    return {
        "top1": accuracy.all,
        "many": accuracy.many,
        "medium": accuracy.medium,
        "few": accuracy.few,
        "balanced": accuracy.balanced,
        **_calibration(summary, labels, num_bins),
    }


def _calibration_by_group(
    summary: Summary,
    labels: npt.NDArray[np.int32],
    class_counts: npt.NDArray[np.int64],
    num_bins: int,
    thresholds: tuple[int, int],
) -> dict[str, dict[str, float]]:
    """Calibration over the examples whose label is in each shot group."""
    return {
        name: _calibration(summary, labels, num_bins, members[labels])
        for name, members in metrics.shot_groups(class_counts, thresholds)._asdict().items()
    }


def _calibration(
    summary: Summary,
    labels: npt.NDArray[np.int32],
    num_bins: int,
    chosen: npt.NDArray[np.bool_] | slice = np.s_[:],
) -> dict[str, float]:
    names = ("ece", "mce", "adaptive_ece", "nll", "brier")
    confidence, correct = summary.confidence[chosen], (summary.predicted == labels)[chosen]
    if not confidence.size:
        return dict.fromkeys(names, float("nan"))
    bins = metrics.bin_confidences(confidence, correct, num_bins)
    adaptive = metrics.adaptive_calibration_error(confidence, correct, num_bins)
    means = summary.nll[chosen].mean(), summary.brier[chosen].mean()
    return dict(zip(names, (bins.ece, bins.mce, adaptive, *means), strict=True))


def _score_bias(
    class_counts: npt.NDArray[np.int64],
    taus: Sequence[float | None],
    ensemble: Summary,
    experts: Sequence[Summary],
) -> dict[str, Any]:
    """KL divergence of target priors from expected marginals (paper, Fig. 3)."""
    uniform = np.full(len(class_counts), 1 / len(class_counts))
    return {
        "experts": [
            {"lambda": None, "kl": None}
            if tau is None
            else {
                "lambda": 1 - tau,
                "kl": metrics.kl_divergence(
                    metrics.target_prior(class_counts, tau), expert.marginal
                ),
            }
            for tau, expert in zip(taus, experts, strict=True)
        ],
        "ensemble": {"kl": metrics.kl_divergence(uniform, ensemble.marginal)},
    }


def _score_held_out(
    held_out: Predictions | None,
    class_counts: npt.NDArray[np.int64],
    num_bins: int,
    thresholds: tuple[int, int],
) -> dict[str, Any] | None:
    """The ensemble's scores on the held-out examples, by which settings can be chosen."""
    if held_out is None:
        return None
    summary = summarize(held_out.ensemble, held_out.labels)
    scores = _score_classifier(summary, held_out.labels, class_counts, num_bins, thresholds)
    return {"num_examples": len(held_out.labels), **scores}


def _score_temperature(
    test: Predictions,
    held_out: Predictions | None,
    description: str,
    class_counts: npt.NDArray[np.int64],
    num_bins: int,
    thresholds: tuple[int, int],
) -> dict[str, Any] | None:
    """Calibration after temperature scaling, each classifier with its own temperature."""
    if held_out is None:
        return None

    def rescaled(logits: Any, held_out_logits: npt.NDArray) -> dict[str, Any]:
        temperature = metrics.fit_temperature(held_out_logits, held_out.labels)
        summary = summarize(logits, test.labels, scale=1 / temperature)
        groups = _calibration_by_group(summary, test.labels, class_counts, num_bins, thresholds)
        scores = _calibration(summary, test.labels, num_bins)
        return {"value": temperature, **scores, "groups": groups}

    ensemble = rescaled(test.ensemble, held_out.ensemble[:])
    pairs = zip(test.expert_logits, held_out.expert_logits, strict=True)
    return {
        "fitted_on": description,
        "num_examples": len(held_out.labels),
        "ensemble": ensemble,
        "experts": [rescaled(*pair) for pair in pairs],
    }


def _score_ensemble(
    test: Predictions,
    class_counts: npt.NDArray[np.int64],
    taus: Sequence[float | None],
    experts: Sequence[Summary],
    thresholds: tuple[int, int],
) -> dict[str, Any]:
    """The scores of the experts together: accuracy of their subsets, and disagreement."""
    predicted = np.stack([expert.predicted for expert in experts])
    accuracies = (predicted == test.labels).mean(axis=1)
    together = (metrics.predicted_classes(test.ensemble) == test.labels).mean()
    differences = metrics.disagreement(predicted)
    pairs = differences[np.triu_indices(len(experts), k=1)]
    subsets: list[dict[str, Any]] = []
    for members in _subsets(len(experts)):
        guesses = metrics.predicted_classes(MeanLogits(test.expert_logits, members))
        accuracy = metrics.shot_accuracy(guesses, test.labels, class_counts, thresholds)
        subsets.append(
            {
                "experts": [member + 1 for member in members],
                "mean_tau": _mean_tau([taus[member] for member in members]),
                "top1": accuracy.all,
                "many": accuracy.many,
                "medium": accuracy.medium,
                "few": accuracy.few,
            }
        )
    return {
        "gain": float(together - accuracies.mean()),
        "disagreement": differences,
        "mean_disagreement": float(pairs.mean()) if pairs.size else float("nan"),
        "subsets": subsets,
    }


def _mean_tau(taus: Sequence[float | None]) -> float | None:
    """The mean of the taus; None if not every expert has one."""
    known = [tau for tau in taus if tau is not None]
    return float(np.mean(known)) if len(known) == len(taus) else None


def _subsets(num_experts: int) -> list[tuple[int, ...]]:
    """The subsets of the experts by size, or a seeded choice where a size has too many."""
    chosen: list[tuple[int, ...]] = []
    random = np.random.default_rng(0)
    for size in range(1, num_experts + 1):
        if num_experts <= 7:
            chosen += itertools.combinations(range(num_experts), size)
        else:
            draws = {
                tuple(sorted(random.choice(num_experts, size, replace=False).tolist()))
                for _ in range(_SUBSETS_A_SIZE)
            }
            chosen += sorted(draws)
    return chosen


def _evidence_of_priors(
    test: Predictions, held_out: Predictions | None, class_counts: npt.NDArray[np.int64]
) -> dict[str, jax.Array]:
    """Probabilities of the whole test set to estimate priors from: raw, and corrected if possible.

    Each is one array `[N, C]` in single precision, shared by all target distributions.
    """
    logits = test.ensemble
    corrections = {"raw": Correction(1.0, np.zeros(logits.shape[1]))}
    if held_out is not None:
        corrections["corrected"] = metrics.fit_bias_correction(
            held_out.ensemble[:], held_out.labels, class_counts
        )
    return {name: _probabilities(logits, correction) for name, correction in corrections.items()}


def _score_target(
    test: Predictions,
    target: TestDistribution,
    evidence: Mapping[str, jax.Array],
    shift_test: Callable[[npt.NDArray[np.int64]], float] | None,
    prior_strength: float,
    shift_test_level: float,
    num_bins: int,
) -> dict[str, Any]:
    """Accuracy, calibration and the quality of the estimated priors on one distribution."""
    logits, num_classes = test.ensemble, test.expert_logits.shape[2]
    truth = target.prior
    estimates = _estimate_priors(target, evidence, prior_strength)
    offsets = {
        "none": None,
        "prior": log_target_prior(truth, num_classes),
        **{
            name: log_target_prior(estimate.prior, num_classes)
            for name, estimate in estimates.items()
        },
    }
    labels = test.labels[target.indices]
    top1, ece, p_value = {}, {}, None
    for name, offset in offsets.items():
        summary = summarize(logits, test.labels, target.indices, offset=offset)
        correct = summary.predicted == labels
        top1[name] = float(correct.mean())
        ece[name] = metrics.bin_confidences(summary.confidence, correct, num_bins).ece
        if name == "none" and shift_test is not None:
            p_value = shift_test(summary.predicted)
    used = "map" if p_value is None or p_value <= shift_test_level else "none"
    uniform = np.full(num_classes, 1 / num_classes)
    return {
        "top1": {"none": top1["none"], "prior": top1["prior"], "estimated": top1[used]},
        "num_examples": len(target.indices),
        "origin": target.origin,
        "ece": {"none": ece["none"], "prior": ece["prior"], "estimated": ece[used]},
        "l1_of_uniform": _l1(uniform, truth),
        "shift_p_value": p_value,
        "estimate_used": used == "map",
        "estimates": {
            name: {
                "top1": top1[name],
                "l1": _l1(estimate.prior, truth),
                "rounds": int(estimate.rounds),
                "change": float(estimate.change),
                "converged": bool(estimate.change < TOLERANCE),
            }
            for name, estimate in estimates.items()
        },
    }


def _estimate_priors(
    target: TestDistribution, evidence: Mapping[str, jax.Array], prior_strength: float
) -> dict[str, PriorEstimate]:
    """The prior of a distribution, estimated in each way, from what `_evidence_of_priors` gives."""
    num_examples, num_classes = evidence["raw"].shape
    weight = concentration(len(target.indices), num_classes, prior_strength)
    # The examples of the target count once, the others not at all: one shape for all targets.
    members = np.zeros(num_examples, np.float32)
    members[target.indices] = 1
    best = evidence.get("corrected", evidence["raw"])
    estimates = {
        "map": estimate_prior(best, members, weight),
        "ml": estimate_prior(best, members),
    }
    if "corrected" in evidence:
        estimates["map_uncorrected"] = estimate_prior(evidence["raw"], members, weight)
    return estimates


def score_aggregations(
    test: Predictions, targets: Sequence[TestDistribution], learnt: Sequence[Aggregation]
) -> dict[str, Any]:
    """The accuracy on each target distribution with the expert weights that were learnt there.

    Weights that collapsed are refused: equal ones are used in their place.

    Returns:
        By the target's name, `weights` `[E]` and their `history` over the epochs, `collapsed`,
        and the accuracy with equal weights, with the learnt ones, and with those that are used.
    """
    scores = {}
    for target, found in zip(targets, learnt, strict=True):
        labels = test.labels[target.indices]
        equal, weighted = (
            float((summarize(logits, test.labels, target.indices).predicted == labels).mean())
            for logits in (
                test.ensemble,
                MeanLogits(test.expert_logits, weights=found.weights.tolist()),
            )
        )
        scores[target.name] = {
            "weights": found.weights,
            "history": found.history,
            "collapsed": found.collapsed,
            "top1": {
                "equal": equal,
                "learnt": weighted,
                "used": equal if found.collapsed else weighted,
            },
        }
    return scores


def _shift_test(
    held_out: Predictions, class_counts: npt.NDArray[np.int64]
) -> Callable[[npt.NDArray[np.int64]], float]:
    """A function from predicted classes to the p-value of a uniform prior."""
    return functools.partial(
        metrics.prior_shift_p_value,
        held_out_predicted=metrics.predicted_classes(held_out.ensemble),
        held_out_labels=held_out.labels,
        train_counts=class_counts,
    )


def _probabilities(logits: Any, correction: Correction) -> jax.Array:
    """Softmax of corrected logits, float32 `[N, C]`."""
    probabilities = np.empty(logits.shape, np.float32)
    for block in metrics.blocks(*logits.shape):
        probabilities[block] = metrics.softmax(logits[block] * correction.scale + correction.bias)
    return jnp.asarray(probabilities)


def _l1(estimate: Any, truth: npt.NDArray[np.float64]) -> float:
    return float(np.abs(np.asarray(estimate, np.float64) - truth).sum())
