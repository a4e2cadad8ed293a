# SPDX-License-Identifier: Apache-2.0
"""Small sources and settings for the host's pipeline, and comparisons of batches."""

import jax
import numpy as np

from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.data.settings import AugmentSettings, MixSettings, TrainSettings
from balpoe_jax.data.types import EvalBatch, TrainBatch

BATCH = 8
NUM_EXAMPLES = 21  # 3 steps an epoch, whose last batch wraps by 3 examples

# Settings without augmentation, mixing and normalisation.
PLAIN = {"augment": AugmentSettings(), "mix": MixSettings(), "mean": (0, 0, 0), "std": (1, 1, 1)}


def make_source(num_examples: int = NUM_EXAMPLES) -> ArraySource:
    """Noise of 8 x 8 pixels, in five classes by turns."""
    images = np.random.RandomState(0).randint(0, 256, (num_examples, 8, 8, 3)).astype(np.uint8)
    positions = np.arange(num_examples)
    return ArraySource(images, positions % 5, positions)


def make_settings(**changes) -> TrainSettings:
    """Settings with augmentation and mixup, with these fields changed."""
    fields = {
        "batch_size": BATCH,
        "seed": 3,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "augment": AugmentSettings(crop_padding=1, flip=True, rotation=15.0),
        "mix": MixSettings(alpha=0.4),
    }
    return TrainSettings(**{**fields, **changes})


def assert_equal(left, right) -> None:
    """Asserts that two lists of batches have the same arrays."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def join(parts: list[list[TrainBatch]]) -> list[TrainBatch]:
    """The global batches of steps, joined from the rows of each host."""
    return [jax.tree.map(lambda *x: np.concatenate(x), *step) for step in zip(*parts, strict=True)]


def numbered_source(num_examples: int) -> ArraySource:
    """Images that hold their own positions, so that a batch tells which examples it has."""
    positions = np.arange(num_examples)
    images = np.broadcast_to(positions[:, None, None, None], (num_examples, 2, 2, 3))
    return ArraySource(images.astype(np.uint8), positions % 3, positions)


def positions_of(batch: TrainBatch | EvalBatch) -> np.ndarray:
    """Positions int `[B]` of the examples in a batch from a numbered source."""
    return np.round(batch.images[:, 0, 0, 0] * 255).astype(int)
