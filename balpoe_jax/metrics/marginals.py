# SPDX-License-Identifier: Apache-2.0
"""The prior that an expert is trained for, and the distance of its predictions from it."""

import numpy as np
import numpy.typing as npt
from scipy import special

from balpoe_jax.errors import UserError


def target_prior(class_counts: npt.ArrayLike, tau: float) -> npt.NDArray[np.float64]:
    """The prior `π^λ / Σ π^λ`, `λ = 1 - tau`, under which an expert's raw logits are unbiased.

    These are BalPoE's parametrised target priors (paper, section 3): tau 0 is the training prior, 1
    the uniform one, 2 the inverse one.

    Args:
        class_counts: Training images of each class, int `[C]`, all positive.
        tau: Tau of the expert's loss.

    Returns:
        float64 `[C]`, summing to 1.

    Raises:
        UserError (a `ValueError`): an empty class.
    """
    counts = np.asarray(class_counts, np.float64)
    if counts.ndim != 1 or not (counts > 0).all():
        raise UserError("Expected class_counts [C] that are all positive.")
    return special.softmax((1 - tau) * np.log(counts))


def kl_divergence(p: npt.ArrayLike, q: npt.ArrayLike) -> float:
    """`KL(p || q)` in nats; infinite where `q` is 0 and `p` is not.

    Args:
        p: Distribution, float `[C]`.
        q: Another one, float `[C]`.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape:
        raise UserError(f"Expected two distributions of one length, got {p.shape} and {q.shape}.")
    return float(special.rel_entr(p, q).sum())
