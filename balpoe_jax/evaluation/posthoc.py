# SPDX-License-Identifier: Apache-2.0
"""What can be done to logits after training: logit adjustment, temperature, an estimated prior.

Everything is chosen on held-out rows and scored on others. Post-hoc logit adjustment (Menon et al.,
Long-tail learning via logit adjustment, ICLR 2021) subtracts `tau * log(training frequency)`.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from balpoe_jax import metrics
from balpoe_jax.evaluation.abstention import Threshold, find_threshold
from balpoe_jax.evaluation.predictions import Predictions
from balpoe_jax.evaluation.priors import concentration, estimate_prior
from balpoe_jax.metrics import softmax

# The taus that are tried, and the precisions for which thresholds are found.
TAUS = np.linspace(0, 2, 41)
PRECISIONS = (0.8, 0.9, 0.95, 0.99)


class Fitted(NamedTuple):
    """What was chosen on held-out rows.

    Attributes:
        tau: Factor of the log-frequencies that are subtracted from logits.
        temperature: Divisor of the adjusted logits.
        scores: Balanced accuracy on held-out rows of each of `TAUS`.
    """

    tau: float
    temperature: float
    scores: npt.NDArray[np.float64]


def adjust(
    logits: npt.NDArray[np.floating], class_counts: npt.NDArray[np.int64], tau: float
) -> npt.NDArray[np.float64]:
    """Logits minus `tau * log(frequency)` of each class.

    Args:
        logits: Logits, float `[..., C]`.
        class_counts: Training examples of each class, int `[C]`, positive.
        tau: Factor; 0 changes nothing.
    """
    frequencies = class_counts / class_counts.sum()
    return np.asarray(logits, np.float64) - tau * np.log(frequencies)


def fit(
    logits: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    class_counts: npt.NDArray[np.int64],
) -> Fitted:
    """Chooses tau by balanced accuracy, then the temperature of the adjusted logits.

    Of several taus with the best accuracy it is the one in their middle. A class without held-out
    rows has no part in the choice.

    Args:
        logits: Held-out logits, float `[N, C]`.
        labels: Their classes, int `[N]`.
        class_counts: Training examples of each class, int `[C]`.
    """
    weights = 1 / np.bincount(labels, minlength=len(class_counts)).clip(1)[labels]
    scores = np.array(
        [
            np.sum(weights * (adjust(logits, class_counts, tau).argmax(axis=1) == labels))
            for tau in TAUS
        ]
    ) / len(np.unique(labels))
    best = np.flatnonzero(scores >= scores.max() - 1e-12)
    tau = float(TAUS[best[len(best) // 2]])
    temperature = metrics.fit_temperature(adjust(logits, class_counts, tau), labels)
    return Fitted(tau, temperature, scores)


def variants(
    test: npt.NDArray[np.floating],
    held_out: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    class_counts: npt.NDArray[np.int64],
    fitted: Fitted,
) -> dict[str, tuple[float, float, npt.NDArray[np.float64]]]:
    """Tau, temperature and probabilities `[N, C]` of the test rows, by what was done to them.

    Args:
        test: Logits of the test rows, float `[N, C]`.
        held_out: Held-out logits, float `[M, C]`.
        labels: Classes of the held-out rows, int `[M]`.
        class_counts: Training examples of each class, int `[C]`.
        fitted: What was chosen on the held-out rows.
    """
    plain = metrics.fit_temperature(held_out, labels)
    adjusted = adjust(test, class_counts, fitted.tau)
    balanced = softmax(adjusted / fitted.temperature)
    weight = concentration(len(test), len(class_counts))
    prior = np.asarray(estimate_prior(balanced, concentration=weight).prior, np.float64)
    estimated = balanced * prior
    return {
        "as given": (0.0, 1.0, softmax(np.asarray(test, np.float64))),
        "temperature": (0.0, plain, softmax(np.asarray(test, np.float64) / plain)),
        "adjusted": (fitted.tau, 1.0, softmax(adjusted)),
        "adjusted, temperature": (fitted.tau, fitted.temperature, balanced),
        "and an estimated prior": (
            fitted.tau,
            fitted.temperature,
            estimated / estimated.sum(axis=1, keepdims=True),
        ),
    }


def score_variants(
    found: dict[str, tuple[float, float, npt.NDArray[np.float64]]],
    labels: npt.NDArray[np.integer],
    class_counts: npt.NDArray[np.int64],
    thresholds: tuple[int, int],
    num_bins: int = 15,
) -> list[dict[str, Any]]:
    """Accuracy and calibration of each variant; a part of `results.json`.

    Args:
        found: What `variants` returned.
        labels: Classes of the test rows, int `[N]`.
        class_counts: Training examples of each class, int `[C]`.
        thresholds: Thresholds of the shot groups.
        num_bins: Number of bins of the ECE.
    """
    rows = []
    for name, (tau, temperature, probabilities) in found.items():
        predicted = probabilities.argmax(axis=1)
        accuracy = metrics.shot_accuracy(predicted, labels, class_counts, thresholds)
        confidence = probabilities.max(axis=1)
        picked = probabilities[np.arange(len(labels)), labels]
        rows.append(
            {
                "name": name,
                "tau": tau,
                "temperature": temperature,
                "top1": accuracy.all,
                "balanced": accuracy.balanced,
                "many": accuracy.many,
                "medium": accuracy.medium,
                "few": accuracy.few,
                "ece": metrics.bin_confidences(confidence, predicted == labels, num_bins).ece,
                "nll": float(-np.mean(np.log(np.maximum(picked, 1e-300)))),
            }
        )
    return rows


def score_thresholds(
    held_out: npt.NDArray[np.floating],
    held_out_labels: npt.NDArray[np.integer],
    test: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
) -> list[dict[str, Any]]:
    """Thresholds of the confidence for some precisions, and what they do on the test rows.

    Args:
        held_out: Probabilities of the held-out rows, float `[M, C]`.
        held_out_labels: Their classes, int `[M]`.
        test: Probabilities of the test rows, float `[N, C]`.
        labels: Their classes, int `[N]`.
    """
    rows = []
    for precision in PRECISIONS:
        right = held_out.argmax(axis=1) == held_out_labels
        threshold = find_threshold(held_out.max(axis=1), right, precision)
        rows.append({"precision": precision, **_on_test(threshold, test, labels)})
    return rows


def _on_test(
    threshold: Threshold | None,
    test: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
) -> dict[str, Any]:
    if threshold is None:
        return {"confidence": None}
    named = test.max(axis=1) >= threshold.confidence
    right = (test.argmax(axis=1) == labels)[named]
    return {
        "confidence": threshold.confidence,
        "held_out_precision": threshold.precision,
        "held_out_low": threshold.low,
        "held_out_coverage": threshold.coverage,
        "test_precision": float(right.mean()) if named.any() else None,
        "test_coverage": float(named.mean()),
    }


def adjusted_predictions(
    rows: Predictions, class_counts: npt.NDArray[np.int64], tau: float
) -> Predictions:
    """The rows with adjusted logits.

    Args:
        rows: Rows.
        class_counts: Training examples of each class, int `[C]`.
        tau: Factor of the log-frequencies.
    """
    adjusted = adjust(rows.expert_logits, class_counts, tau).astype(np.float32)
    return Predictions(adjusted, rows.labels)
