# SPDX-License-Identifier: Apache-2.0
"""The prior that each expert is trained for, and how far what it predicts is from it."""

import numpy as np
import numpy.typing as npt
from scipy import special

from balpoe_jax.errors import UserError


def target_prior(class_counts: npt.ArrayLike, tau: float) -> npt.NDArray[np.float64]:
    """The prior `π^λ / Σ π^λ` with `λ = 1 - tau` that an expert's raw logits are unbiased for.

    BalPoE's parametrised target priors (paper, section 3): tau 0 keeps the training prior, 1 is
    uniform, 2 its inverse.

    Args:
        class_counts: int `[C]`, all positive.
        tau: of the expert's loss.

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
        p: float `[C]`, a distribution.
        q: float `[C]`, another one.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape:
        raise UserError(f"Expected two distributions of one length, got {p.shape} and {q.shape}.")
    return float(special.rel_entr(p, q).sum())
