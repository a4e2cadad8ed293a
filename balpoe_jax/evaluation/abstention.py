# SPDX-License-Identifier: Apache-2.0
"""A confidence below which a class is not named, so that those named are as precise as asked."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from balpoe_jax.errors import UserError


class Threshold(NamedTuple):
    """A threshold of the confidence, and what it did on held-out images.

    Attributes:
        confidence: Least confidence at which a class is named.
        precision: Share of the named images that were right.
        low, high: 95% interval of the precision, by Clopper and Pearson.
        coverage: Share of the images that were named.
        number: Number of held-out images.
    """

    confidence: float
    precision: float
    low: float
    high: float
    coverage: float
    number: int

    def __str__(self) -> str:
        return (
            f"Unsure below a confidence of {self.confidence:.3f}: of {self.number:,} held-out "
            f"images {100 * self.coverage:.1f}% are above, and {100 * self.precision:.1f}% of "
            f"those are right (95% interval {100 * self.low:.1f} to {100 * self.high:.1f})"
        )


def find_threshold(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, precision: float
) -> Threshold | None:
    """The lowest threshold that reaches a precision on held-out images; None if none does.

    Args:
        confidence: Probability of the predicted class, float `[N]`.
        correct: Whether it was the right one, bool `[N]`.
        precision: Least share of the named images that must be right, in (0, 1].

    Raises:
        UserError (a `ValueError`): a precision out of range, or no image.
    """
    if not 0 < precision <= 1:
        raise UserError(f"A precision must be above 0 and at most 1, got {precision:g}.")
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, bool)
    if not len(confidence) or confidence.shape != correct.shape:
        raise UserError(
            "A threshold needs held-out images and whether each is right, got shapes "
            f"{confidence.shape} and {correct.shape}."
        )
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    right = np.cumsum(correct[order])
    named = np.arange(1, len(order) + 1)
    # Equal confidences are on one side of a threshold.
    last_of_equals = np.append(sorted_confidence[1:] < sorted_confidence[:-1], True)
    reached = np.flatnonzero(last_of_equals & (right >= precision * named - 1e-12))
    if not len(reached):
        return None
    last = reached[-1]
    hits, count = int(right[last]), int(named[last])
    interval = stats.binomtest(hits, count).proportion_ci(0.95, "exact")
    return Threshold(
        float(sorted_confidence[last]),
        hits / count,
        float(interval.low),
        float(interval.high),
        count / len(order),
        len(order),
    )
