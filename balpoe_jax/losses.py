# SPDX-License-Identifier: Apache-2.0
"""Pure per-example losses for long-tailed recognition.

The notation is that of the paper (Sanchez Aimar et al., Balanced Product of Calibrated Experts for
Long-Tailed Recognition, CVPR 2023): `C` classes, training prior `pi`, `E` experts with biases
`tau_e = 1 - lambda_e`. Losses come back per example; reductions are the caller's visible lines.

Your own training loop needs three calls:

>>> import jax.numpy as jnp
>>> prior = log_prior([500, 50, 5])
>>> taus = equidistant_taus(0.0, 2.0, num_experts=3)
>>> logits = jnp.zeros((3, 4, 3))                      # [experts, batch, classes]
>>> labels = jnp.array([0, 1, 2, 2])
>>> balpoe_loss(logits, labels, prior, taus).shape     # then .mean() over the batch
(4,)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError

# Keeps the logarithm finite for a class without examples; the reference adds it for every class.
_PRIOR_EPSILON = 1e-9

# The largest whole number up to which all are exact as floats.
_LARGEST = 2**53

# Below this the focal factor no longer changes: its gradient stays finite for an exponent below 1.
_LEAST_DISTANCE = 1e-12


def log_prior(class_counts: npt.ArrayLike, allow_empty: bool = False) -> jax.Array:
    """Logarithm of the training prior, `log(n / sum(n) + 1e-9)`.

    Args:
        class_counts: Numbers of training examples by class, `[C]`, not negative.
        allow_empty: Whether to accept classes without examples; their entry is `log(1e-9)`.

    Returns:
        float32 `[C]`, computed in float64.

    Raises:
        UserError (a `ValueError`): counts of another shape, negative or not finite, all zero, or
            an empty class that is not allowed.

    The epsilon is the reference repository's (`BSExpertLoss`); the paper's Eq. 3 has none.
    """
    try:
        counts = np.asarray(class_counts, np.float64)
    except (ValueError, OverflowError, TypeError) as error:
        raise UserError(f"class_counts must be a vector of numbers [C] ({error}).") from error
    if counts.ndim != 1 or counts.size == 0:
        raise UserError(f"class_counts must be a vector [C], got shape {counts.shape}.")
    if not ((counts >= 0) & (counts <= _LARGEST)).all() or counts.sum() == 0:
        raise UserError(
            "class_counts must be at most 2**53, not negative and not all zero, "
            f"got values from {counts.min()} to {counts.max()}."
        )
    empty = np.flatnonzero(counts == 0)
    if empty.size and not allow_empty:
        raise UserError(
            f"Every class needs at least one training example, but {empty.size} of {counts.size} "
            f"are empty (the first: class {empty[0]}); pass allow_empty=True to accept them."
        )
    return jnp.asarray(np.log(counts / counts.sum() + _PRIOR_EPSILON), jnp.float32)


def equidistant_taus(low: float, high: float, num_experts: int) -> tuple[float, ...]:
    """The biases of `num_experts` experts, equidistant with both ends included.

    One expert gets the mid-point, which for `low=0, high=2` makes it balanced softmax.

    Args:
        low: Tau of the first expert (0: it keeps the training prior).
        high: Tau of the last expert (2: it is biased to the inverted prior).
        num_experts: Number of experts, at least 1.

    Returns:
        `num_experts` Python floats. The mean is `(low + high) / 2`; the ensemble is unbiased for
        a balanced test set when that is 1 (paper, Section 4.2: mean lambda of 0).
    """
    if num_experts < 1:
        raise UserError(f"num_experts must be at least 1, got {num_experts}.")
    if num_experts == 1:
        return ((low + high) / 2,)
    return tuple(low + (high - low) * e / (num_experts - 1) for e in range(num_experts))


def logit_adjusted_cross_entropy(
    logits: jax.Array, labels: jax.Array, log_prior: jax.Array, tau: float | jax.Array
) -> jax.Array:
    """Cross-entropy of logits to which `tau` times the log prior was added.

    `tau = 0` is plain cross-entropy, `tau = 1` balanced softmax (Ren et al., NeurIPS 2020; Menon
    et al., ICLR 2021), `tau = 1 - lambda` an expert of BalPoE (paper, Eq. 6). The adjustment
    belongs to training only: predict with the raw logits.

    Args:
        logits: Logits, float `[..., C]`. The loss is computed in float32, or in their float64.
        labels: Class indices in `[0, C)`, int `[...]`, or distributions, float `[..., C]`, such as
            the mixed labels of mixup. An index out of range gives `nan`: it cannot be refused
            inside a compiled function.
        log_prior: Logarithm of the training prior, float `[C]`, see `log_prior`.
        tau: Factor of the log prior: a scalar, or an array that broadcasts against `[...]`.

    Returns:
        float `[...]`, the loss of each example in nats.

    Raises:
        UserError (a `ValueError`): shapes that do not fit.
    """
    logits, labels, log_prior = jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(log_prior)
    _check_shapes(logits, labels, log_prior)
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    taus = jnp.broadcast_to(jnp.asarray(tau, dtype), logits.shape[:-1])[..., None]
    bias = taus * _rank_as(log_prior.astype(dtype), logits)
    log_probabilities = jax.nn.log_softmax(logits.astype(dtype) + bias)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        # Negative indices would count from the end: send them out of range, where fill is nan.
        index = jnp.where(labels < 0, logits.shape[-1], labels)[..., None]
        picked = jnp.take_along_axis(log_probabilities, index, axis=-1, mode="fill")
        return -picked[..., 0]
    return -jnp.sum(labels.astype(dtype) * log_probabilities, axis=-1)


def expert_losses(
    expert_logits: jax.Array,
    labels: jax.Array,
    log_prior: jax.Array,
    taus: Sequence[float] | jax.Array,
) -> jax.Array:
    """The logit-adjusted cross-entropy of each expert for each example.

    Args and errors as in `balpoe_loss`. Returns float `[E, B]`.
    """
    expert_logits, taus = jnp.asarray(expert_logits), jnp.asarray(taus)
    if expert_logits.ndim != 3:
        raise UserError(f"expert_logits must have shape [E, B, C], got {expert_logits.shape}.")
    if taus.shape != expert_logits.shape[:1]:
        raise UserError(
            f"Expected one tau for each of the {expert_logits.shape[0]} experts, "
            f"got taus of shape {taus.shape}."
        )
    return jax.vmap(logit_adjusted_cross_entropy, in_axes=(0, None, None, 0))(
        expert_logits, jnp.asarray(labels), log_prior, taus
    )


def balpoe_loss(
    expert_logits: jax.Array,
    labels: jax.Array,
    log_prior: jax.Array,
    taus: Sequence[float] | jax.Array,
) -> jax.Array:
    """The BalPoE loss: the mean over experts of their logit-adjusted cross-entropies.

    The mean, not the sum, as in the reference repository: it sets the scale of the gradient
    against weight decay. Paper, Eq. 7.

    Args:
        expert_logits: Logits of each expert, float `[E, B, C]`.
        labels: Class indices, int `[B]`, or distributions, float `[B, C]`. The loss is linear in
            the label, so a mixed label equals the mix of two losses.
        log_prior: Logarithm of the training prior, float `[C]`, see `log_prior`.
        taus: Factor of the log prior for each expert, `[E]`, see `equidistant_taus`.

    Returns:
        float `[B]`, the loss of each example in nats.

    Raises:
        UserError (a `ValueError`): shapes that do not fit, or taus that do not match the experts.
    """
    return expert_losses(expert_logits, labels, log_prior, taus).mean(axis=0)


def _rank_as(vector: jax.Array, array: jax.Array) -> jax.Array:
    """`[C]` as `[1, ..., 1, C]`, so that nothing relies on implicit rank promotion."""
    return vector.reshape((1,) * (array.ndim - 1) + vector.shape)


def _check_shapes(logits: jax.Array, labels: jax.Array, log_prior: jax.Array) -> None:
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise UserError(f"logits must be floating, got {logits.dtype}.")
    if log_prior.shape != logits.shape[-1:]:
        raise UserError(
            f"log_prior must have shape {logits.shape[-1:]} to fit logits of shape "
            f"{logits.shape}, got {log_prior.shape}."
        )
    indices = jnp.issubdtype(labels.dtype, jnp.integer)
    expected = logits.shape[:-1] if indices else logits.shape
    if labels.shape != expected:
        kind = "class indices" if indices else "label distributions"
        raise UserError(
            f"{kind} must have shape {expected} to fit logits of shape {logits.shape}, "
            f"got {labels.shape}."
        )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of float logits `[B, C]` and int labels `[B]`, in nats: float `[B]`."""
    return logit_adjusted_cross_entropy(logits, labels, jnp.zeros(logits.shape[-1:]), 0.0)


def focal_loss(losses: jax.Array, gamma: float) -> jax.Array:
    """`(1 - p)^gamma * loss`, where `p = exp(-loss)` is the probability of the label.

    The focal loss of Lin et al. (ICCV 2017).

    Args:
        losses: Cross-entropies, float `[B]`.
        gamma: Exponent, not negative; 0 leaves the losses as they are.
    """
    if gamma == 0:
        return losses
    return jnp.maximum(-jnp.expm1(-losses), _LEAST_DISTANCE) ** gamma * losses


def class_balanced_weights(
    class_counts: npt.NDArray[np.integer], beta: float
) -> npt.NDArray[np.float64]:
    """Inverse effective numbers of examples `(1 - beta) / (1 - beta^n)`, scaled to sum to C.

    The weights of Cui et al. (CVPR 2019). With `beta = 0.9999` and classes of up to a few hundred
    examples they are nearly proportional to `1 / n`.

    Args:
        class_counts: Numbers of training examples by class, int `[C]`, none of them 0.
        beta: Parameter of the effective number, in [0, 1); 0 gives equal weights.

    Returns:
        float64 `[C]`.
    """
    weights = (1 - beta) / (1 - np.power(beta, np.asarray(class_counts, np.float64)))
    return weights * len(weights) / weights.sum()


def ldam_margins(
    class_counts: npt.NDArray[np.integer], max_margin: float
) -> npt.NDArray[np.float64]:
    """Margins `max_margin * (n / n_min)^(-1/4)` of cosines, the rarest class's being the largest.

    Args:
        class_counts: Numbers of training examples by class, int `[C]`, none of them 0.
        max_margin: Margin of the rarest class.

    Returns:
        float64 `[C]`.
    """
    counts = np.asarray(class_counts, np.float64)
    return max_margin * (counts / counts.min()) ** -0.25


def ldam_loss(
    logits: jax.Array, labels: jax.Array, margins: npt.ArrayLike, scale: float
) -> jax.Array:
    """Cross-entropy of logits, the label's lowered by its class's margin.

    The loss of Cao et al. (NeurIPS 2019).

    Args:
        logits: Logits of a cosine head, float `[B, C]`, its scale included.
        labels: Class indices, int `[B]`.
        margins: Margin of each class, float `[C]`, see `ldam_margins`.
        scale: Scale of the cosine head, by which the margins are multiplied.

    Returns:
        float `[B]`, in nats.
    """
    lowered = jnp.asarray(margins, logits.dtype)[labels] * scale
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return cross_entropy(logits - lowered[:, None] * one_hot, labels)
