# SPDX-License-Identifier: Apache-2.0
"""Summaries of logits of a whole test set, which are read a few examples at a time.

Logits of a large data set (iNaturalist 2018: 24,426 x 8,142 for each expert) stay in a
memory-mapped file; nothing here holds more than a block of them in memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError

_NUMBERS_A_BLOCK = 2**22  # 32 MB in float64


class MeanLogits:
    """The mean of some experts' logits: an array `[N, C]` that is computed when it is indexed.

    Args:
        expert_logits: Logits float `[E, N, C]`, in memory or memory-mapped.
        experts: Positions of the experts that take part; None for all.
        weights: Weights of these experts, of sum 1; None for equal ones.
    """

    def __init__(
        self,
        expert_logits: npt.NDArray[np.floating],
        experts: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._expert_logits = expert_logits
        self._experts = range(len(expert_logits)) if experts is None else experts
        self._weights = weights
        self.shape: tuple[int, int] = expert_logits.shape[1:]

    def __getitem__(self, rows: Any) -> npt.NDArray[np.float64]:
        """The mean logits of a slice or of positions, float64 `[n, C]`."""
        total = np.zeros_like(self._expert_logits[0, rows], np.float64)
        if self._weights is not None:
            for weight, expert in zip(self._weights, self._experts, strict=True):
                total += weight * self._expert_logits[expert, rows]
            return total
        for expert in self._experts:
            total += self._expert_logits[expert, rows]
        return total / len(self._experts)


class Summary(NamedTuple):
    """A classifier's predictions for `N` examples, without their `[N, C]` probabilities.

    Attributes:
        predicted: Class of the largest logit, int64 `[N]`; ties go to the lowest class.
        confidence: Probability of that class, float64 `[N]`.
        nll: Negative log-likelihood of the label in nats, float64 `[N]`.
        brier: Squared distance from the one-hot label, float64 `[N]`, 0 to 2.
        marginal: Mean probabilities over the examples, the expected marginal, float64 `[C]`.
    """

    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    nll: npt.NDArray[np.float64]
    brier: npt.NDArray[np.float64]
    marginal: npt.NDArray[np.float64]


def summarize(
    logits: Any,
    labels: npt.NDArray[np.integer],
    rows: npt.NDArray[np.integer] | None = None,
    scale: float = 1.0,
    offset: npt.NDArray[np.floating] | None = None,
) -> Summary:
    """Summarises `softmax(scale * logits + offset)`, a block of examples at a time.

    Args:
        logits: Logits float `[N, C]`: an array, or another object with a shape that can be indexed
            by slices and positions.
        labels: True classes, int `[N]`.
        rows: Positions of the examples to summarise; None for all.
        scale: Factor of the logits, the inverse of a temperature.
        offset: Numbers to add afterwards, such as a log prior, float `[C]`.

    Raises:
        UserError (a `ValueError`): logits that are not finite, or no examples.
    """
    num_examples, num_classes = len(labels) if rows is None else len(rows), logits.shape[1]
    if not num_examples:
        raise UserError("There are no examples to summarise.")
    parts: list[tuple[npt.NDArray, ...]] = []
    marginal = np.zeros(num_classes)
    for block in blocks(num_examples, num_classes):
        positions = block if rows is None else rows[block]
        values = np.asarray(logits[positions], np.float64)
        if not np.isfinite(values).all():
            check_finite(logits, rows)  # counts them all, and raises
        values = values * scale + (0.0 if offset is None else np.asarray(offset, np.float64))
        predicted = values.argmax(axis=1)
        values -= values.max(axis=1, keepdims=True)
        own = labels[positions]
        picked = values[np.arange(len(own)), own]
        np.exp(values, out=values)
        totals = values.sum(axis=1)
        values /= totals[:, None]
        marginal += values.sum(axis=0)
        squares = np.einsum("nc,nc->n", values, values)
        brier = squares - 2 * values[np.arange(len(own)), own] + 1
        parts.append((predicted, 1 / totals, np.log(totals) - picked, brier))
    predicted, confidence, nll, brier = map(np.concatenate, zip(*parts, strict=True))
    return Summary(predicted, confidence, nll, brier, marginal / num_examples)


def predicted_classes(logits: Any) -> npt.NDArray[np.int64]:
    """The class of the largest logit of every example, int64 `[N]`, a block at a time.

    Args:
        logits: Logits float `[N, C]`, as for `summarize`.
    """
    return np.concatenate([logits[block].argmax(axis=1) for block in blocks(*logits.shape)])


def blocks(num_examples: int, num_classes: int) -> Iterator[slice]:
    """Slices that cover the examples, each of a few million numbers at most."""
    size = max(1, _NUMBERS_A_BLOCK // num_classes)
    for start in range(0, num_examples, size):
        yield slice(start, min(start + size, num_examples))


def check_finite(
    logits: Any, rows: npt.NDArray[np.integer] | None = None, what: str = "examples"
) -> None:
    """Reads all logits, a block at a time, and raises an error unless they are finite.

    Args:
        logits: Logits float `[N, C]`, as for `summarize`.
        rows: Positions of the examples to read; None for all.
        what: Name of the examples in the message.

    Raises:
        UserError (a `ValueError`): logits that are not finite, with the number of such examples.
    """
    num_examples, num_classes = logits.shape[0] if rows is None else len(rows), logits.shape[1]
    wrong = 0
    for block in blocks(num_examples, num_classes):
        values = logits[block if rows is None else rows[block]]
        wrong += int((~np.isfinite(values).all(axis=1)).sum())
    if wrong:
        raise UserError(
            f"The logits of {wrong:,} of {num_examples:,} {what} are not finite: the model has "
            "diverged; evaluate an earlier checkpoint or train with a lower learning rate."
        )
