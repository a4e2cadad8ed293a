# SPDX-License-Identifier: Apache-2.0
"""The lowest confidence that reaches a precision, by trying all; and its exact interval."""

import numpy as np
import pytest
from scipy import stats

from balpoe_jax.errors import UserError
from balpoe_jax.evaluation.abstention import find_threshold


def draw(number: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(number)
    confidence = random.uniform(0.2, 1, number)
    if ties:
        confidence = confidence.round(1)
    return confidence, random.uniform(size=number) < confidence


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("precision", [0.3, 0.7, 0.9, 0.99])
def test_the_threshold_is_the_lowest_that_reaches_it(precision: float, ties: bool) -> None:
    confidence, correct = draw(300, ties)
    tried = [
        value
        for value in np.unique(confidence)
        if correct[confidence >= value].mean() >= precision - 1e-12
    ]
    found = find_threshold(confidence, correct, precision)
    if not tried:
        assert found is None
        return
    assert found is not None and found.confidence == min(tried)
    named = confidence >= found.confidence
    assert found.coverage == named.mean() and found.number == 300
    assert found.precision == pytest.approx(correct[named].mean())
    hits, count = correct[named].sum(), named.sum()
    low = stats.beta.ppf(0.025, hits, count - hits + 1) if hits else 0
    high = stats.beta.ppf(0.975, hits + 1, count - hits) if hits < count else 1
    assert (found.low, found.high) == pytest.approx((low, high))


def test_no_threshold_reaches_what_the_most_confident_do_not() -> None:
    assert find_threshold([0.9, 0.8], [False, True], 0.6) is None
    found = find_threshold([0.9, 0.8], [True, False], 1.0)
    assert found is not None and (found.confidence, found.coverage) == (0.9, 0.5)
    assert "Unsure below a confidence of 0.900: of 2 held-out images 50.0%" in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], [True], 0.0), "above 0 and at most 1, got 0"),
        (([0.5], [True], 1.5), "above 0 and at most 1, got 1.5"),
        (([], [], 0.5), "needs held-out images"),
        (([0.5], [True, False], 0.5), "needs held-out images and whether each is right"),
    ],
)
def test_what_cannot_be_asked(arguments, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_threshold(*arguments)
