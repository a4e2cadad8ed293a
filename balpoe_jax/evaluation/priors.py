# SPDX-License-Identifier: Apache-2.0
"""Priors of a test distribution: adding a known one to logits, estimating an unknown one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError

TOLERANCE = 1e-6  # of the L1 distance between two rounds

_EPSILON = 1e-9  # as in the training loss: keeps the logarithm of an empty class finite


class PriorEstimate(NamedTuple):
    """An estimated class prior.

    Attributes:
        prior: Frequency of each class, float32 `[C]`, not negative, with a sum of 1.
        rounds: Number of rounds of expectation and maximisation, int32.
        change: L1 distance between the last two rounds' priors, float32; above the tolerance only
            if the rounds ran out.
    """

    prior: jax.Array
    rounds: jax.Array
    change: jax.Array


def log_target_prior(prior: npt.ArrayLike, num_classes: int) -> npt.NDArray[np.float64]:
    """The term to add to the mean logits if the class distribution of the test set is known.

    The logits must be unbiased for a uniform prior, as BalPoE's mean is when the mean tau is 1
    (paper, section 3.2).

    Args:
        prior: Frequency of each class, float `[C]`, not negative, with a sum of 1 within 1e-3.
        num_classes: Number of classes, `C`.

    Returns:
        float64 `[C]`, `log(prior + 1e-9)`.

    Raises:
        UserError (a `ValueError`): a prior of another length, or one that is no distribution.
    """
    values = np.asarray(prior, np.float64)
    if values.shape != (num_classes,):
        raise UserError(
            f"A target prior must have one frequency for each of the {num_classes} classes, got "
            f"shape {values.shape}."
        )
    if not (np.isfinite(values).all() and values.min() >= 0 and abs(values.sum() - 1) <= 1e-3):
        raise UserError(
            "A target prior must have no negative frequency and a sum of 1, got a minimum of "
            f"{values.min():g} and a sum of {values.sum():g}; divide counts by their sum."
        )
    return np.log(values + _EPSILON)


def concentration(examples: int, classes: int, strength: float = 0.3) -> float:
    """The concentration of a Dirichlet prior that grows with the examples.

    Args:
        examples: Number of examples.
        classes: Number of classes.
        strength: Weight of the uniform distribution against the examples.
    """
    return 1 + strength * examples / classes


def estimate_prior(
    probabilities: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    concentration: float = 1.0,
    tolerance: float = TOLERANCE,
    max_rounds: int = 200,
) -> PriorEstimate:
    """Estimates the class prior of unlabelled examples by expectation-maximisation.

    Starts from the uniform prior. Each round reweights every example's probabilities by the prior
    so far and takes their mean as the next one (Saerens et al., Adjusting the Outputs of a
    Classifier to New a Priori Probabilities, Neural Computation 2002). The log-likelihood is
    concave, so the end does not depend on the start. A round is two products of a matrix and a
    vector.

    Args:
        probabilities: Probabilities under a uniform prior, float `[N, C]`, such as the softmax of
            BalPoE's mean logits; cast to float32. Rows may have any positive sum.
        weights: Weight of each example, float `[N]`, not negative; None for 1 each.
        concentration: Parameter `a >= 1` of a symmetric Dirichlet distribution over priors. 1 gives
            the maximum-likelihood estimate, more a maximum-a-posteriori one that leans to uniform,
            as if each class had been seen `a - 1` more times.
        tolerance: L1 distance between two rounds below which it stops.
        max_rounds: Number of rounds after which it stops in any case.

    Raises:
        UserError (a `ValueError`): shapes that do not fit, no example, or values out of range.
    """
    matrix = jnp.asarray(probabilities, jnp.float32)
    if matrix.ndim != 2 or not matrix.size:
        raise UserError(f"Expected probabilities [N, C] with N >= 1, got shape {matrix.shape}.")
    counts = jnp.ones(len(matrix)) if weights is None else jnp.asarray(weights, jnp.float32)
    if counts.shape != matrix.shape[:1]:
        raise UserError(f"Expected weights [{len(matrix)}], got shape {counts.shape}.")
    usable = (matrix.min() >= 0) & (matrix.sum(axis=1).min() > 0) & jnp.isfinite(matrix.max())
    if not (usable & (counts.min() >= 0) & (counts.sum() > 0) & jnp.isfinite(counts.max())):
        raise UserError(
            "Expected probabilities and weights that are finite and not negative, with something "
            "positive in every row and among the weights; pass logits through softmax."
        )
    if not concentration >= 1:
        raise UserError(f"concentration must be at least 1, got {concentration}.")
    # Beyond, single precision holds no sum of pseudo-counts over the classes.
    largest = float(jnp.finfo(jnp.float32).max) / (2 * matrix.shape[1])
    if concentration > largest:
        raise UserError(f"concentration must be at most {largest:.3g}, got {concentration}.")
    return _maximize(matrix, counts, concentration, tolerance, max_rounds)


@jax.jit
def _maximize(
    probabilities: jax.Array,
    weights: jax.Array,
    concentration: float,
    tolerance: float,
    max_rounds: int,
) -> PriorEstimate:
    num_classes = probabilities.shape[1]
    pseudocount = jnp.asarray(concentration, jnp.float32) - 1
    total = weights.sum() + num_classes * pseudocount
    # In full precision: accelerators would otherwise multiply in bfloat16.
    exact = jax.lax.Precision.HIGHEST

    def improve(estimate: PriorEstimate) -> PriorEstimate:
        evidence = jnp.matmul(probabilities, estimate.prior, precision=exact)
        # An example of weight 0 does not keep its class in the prior, and then this is 0.
        shares = weights / jnp.maximum(evidence, jnp.finfo(jnp.float32).tiny)
        expected = estimate.prior * jnp.matmul(shares, probabilities, precision=exact)
        prior = (expected + pseudocount) / total
        return PriorEstimate(prior, estimate.rounds + 1, jnp.abs(prior - estimate.prior).sum())

    def unfinished(estimate: PriorEstimate) -> jax.Array:
        return (estimate.change >= tolerance) & (estimate.rounds < max_rounds)

    uniform = jnp.full(num_classes, 1 / num_classes, jnp.float32)
    start = PriorEstimate(uniform, jnp.asarray(0, jnp.int32), jnp.asarray(jnp.inf, jnp.float32))
    return jax.lax.while_loop(unfinished, improve, start)
