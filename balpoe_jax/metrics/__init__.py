# SPDX-License-Identifier: Apache-2.0
"""Metrics over a whole test set: NumPy arrays in, float64 numbers out."""

from balpoe_jax.metrics.accuracy import (
    DEFAULT_THRESHOLDS,
    ShotAccuracy,
    ShotGroups,
    disagreement,
    shot_accuracy,
    shot_confusion,
    shot_groups,
)
from balpoe_jax.metrics.calibration import (
    Calibration,
    adaptive_calibration_error,
    bin_confidences,
    brier_score,
    calibration,
    negative_log_likelihood,
    softmax,
)
from balpoe_jax.metrics.marginals import kl_divergence, target_prior
from balpoe_jax.metrics.prior_shift import prior_shift_p_value
from balpoe_jax.metrics.summary import (
    MeanLogits,
    Summary,
    blocks,
    check_finite,
    predicted_classes,
    summarize,
)
from balpoe_jax.metrics.temperature import Correction, fit_bias_correction, fit_temperature

__all__ = [
    "DEFAULT_THRESHOLDS",
    "Calibration",
    "Correction",
    "MeanLogits",
    "ShotAccuracy",
    "ShotGroups",
    "Summary",
    "adaptive_calibration_error",
    "bin_confidences",
    "blocks",
    "brier_score",
    "calibration",
    "check_finite",
    "disagreement",
    "fit_bias_correction",
    "fit_temperature",
    "kl_divergence",
    "negative_log_likelihood",
    "predicted_classes",
    "prior_shift_p_value",
    "shot_accuracy",
    "shot_confusion",
    "shot_groups",
    "softmax",
    "summarize",
    "target_prior",
]
