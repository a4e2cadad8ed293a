# SPDX-License-Identifier: Apache-2.0
"""Metrics over a whole test set: NumPy arrays in, float64 numbers out."""

from balpoe_jax.metrics.accuracy import (
    DEFAULT_THRESHOLDS,
    ShotAccuracy,
    ShotGroups,
    shot_accuracy,
    shot_groups,
)
from balpoe_jax.metrics.calibration import (
    Calibration,
    calibration,
    negative_log_likelihood,
    softmax,
)

__all__ = [
    "DEFAULT_THRESHOLDS",
    "Calibration",
    "ShotAccuracy",
    "ShotGroups",
    "calibration",
    "negative_log_likelihood",
    "shot_accuracy",
    "shot_groups",
    "softmax",
]
