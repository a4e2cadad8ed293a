# SPDX-License-Identifier: Apache-2.0
"""Whether the labels of the first batch are of the class prior that the losses take.

Classes in another order than their counts train as any others do, and cost many points in the end.
The first step shows it. An untrained network knows nothing of labels, so that its losses exceed
those of chance alike for all experts. Where labels and prior disagree, the excess grows with tau.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Growth of the excess with a unit of tau from which labels and prior disagree, as a share of that
# of classes in reverse. Of untrained networks on CIFAR-100-LT, ImageNet-LT and iNaturalist the
# growth is -0.3 to 0.6 with the right prior, and 2.9 to 4.1 with the classes in reverse.
SHARE = 0.6
# The least growth of classes in reverse that is told from chance: an untrained network of few
# classes has logits that are far from equal, and one was seen to reach 1.0 with the right prior.
LEAST = 1.5


def chance_losses(
    class_counts: npt.NDArray[np.int64], taus: Sequence[float]
) -> npt.NDArray[np.float64]:
    """The expected losses of equal logits by expert, float64 `[E]`.

    Args:
        class_counts: Training images of each class, int `[C]`; labels are drawn from them.
        taus: Tau of each expert.
    """
    prior = class_counts[class_counts > 0] / class_counts.sum()
    adjusted = np.multiply.outer(np.asarray(taus, np.float64), np.log(prior))
    normalised = adjusted - np.log(np.exp(adjusted).sum(axis=1, keepdims=True))
    return -(normalised * prior).sum(axis=1)


def excess_by_tau(
    losses: npt.ArrayLike, class_counts: npt.NDArray[np.int64], taus: Sequence[float]
) -> float:
    """The growth with tau of what the losses exceed those of chance by: a line's slope.

    Args:
        losses: Losses of the first step by expert, `[E]`.
        class_counts: Training images of each class, int `[C]`.
        taus: Tau of each expert; at least two must differ.
    """
    excess = np.asarray(losses, np.float64) - chance_losses(class_counts, taus)
    centred = np.asarray(taus, np.float64) - np.mean(taus)
    return float((centred * excess).sum() / (centred**2).sum())


def reversed_excess(class_counts: npt.NDArray[np.int64]) -> float:
    """`excess_by_tau` of equal logits where the rarest class is taken for the most frequent, etc.

    Args:
        class_counts: Training images of each class, int `[C]`.
    """
    prior = np.sort(class_counts[class_counts > 0] / class_counts.sum())
    return float(((prior - prior[::-1]) * np.log(prior)).sum())


def doubt(
    losses: npt.ArrayLike, class_counts: npt.NDArray[np.int64], taus: Sequence[float | None]
) -> str:
    """A sentence where labels and prior most likely disagree; empty where they need not.

    Args:
        losses: Losses of the first step by expert, `[E]`.
        class_counts: Training images of each class, int `[C]`.
        taus: Tau of each expert; None for one whose loss has none.
    """
    known = [tau for tau in taus if tau is not None]
    if len(known) < len(taus) or len(set(known)) < 2:
        return ""
    slope, reverse = excess_by_tau(losses, class_counts, known), reversed_excess(class_counts)
    if reverse < LEAST or not slope > SHARE * reverse:
        return ""
    return (
        f"The losses of the first step exceed those of chance by {slope:.1f} more for each unit of "
        "tau, and should do so alike for all experts: labels, classes and class counts most likely "
        "disagree"
    )
