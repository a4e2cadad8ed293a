# SPDX-License-Identifier: Apache-2.0
"""A few mixed rows and their logits, for slow twins of losses."""

import numpy as np

from balpoe_jax.data.types import TrainBatch

COUNTS = np.array([50, 10, 2])


def mixed_batch() -> tuple[np.ndarray, TrainBatch]:
    """Logits `[2, 4, 3]` of 2 experts, and rows with two labels."""
    random = np.random.default_rng(1)
    batch = TrainBatch(
        views=(),
        labels=np.array([0, 1, 2, 2]),
        other_labels=np.array([1, 1, 0, 2]),
        mix_weight=np.array([0.7, 1.0, 0.25, 0.5]),
    )
    return random.normal(size=(2, 4, 3)), batch


def log_probability(logits: np.ndarray, label: int) -> float:
    """The logarithm of a class's softmax."""
    return logits[label] - np.log(np.exp(logits).sum())
