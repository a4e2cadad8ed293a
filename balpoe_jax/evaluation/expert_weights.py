# SPDX-License-Identifier: Apache-2.0
"""Weights of experts learnt from unlabelled test images (SADE: Zhang et al., NeurIPS 2022, Sec. 4).

Two random views of an image should be predicted alike; the weights that make predictions the most
stable favour the experts that know the classes of the target distribution. The network stays as it
is, so its logits of the views are all that is needed, and learning is a matter of `E` numbers.

The weights are learnt from the very images that are scored: their predictions are transductive, and
stand next to the others, never in their place. Weights may collapse onto one expert, and may do
harm. So those of every epoch are kept, and a collapsed outcome is refused.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

# As in the authors' code for all data sets but iNaturalist, see `methods/sade.py`.
BATCH_SIZE, MOMENTUM, WEIGHT_DECAY = 128, 0.9, 5e-4
LEAST_WEIGHT = 0.05

_NORM_EPSILON = 1e-6  # the least product of lengths that a cosine is divided by


class Aggregation(NamedTuple):
    """How far the weights of one target distribution have been learnt.

    Attributes:
        raw: Logarithms of the weights up to a constant, float64 `[E]`: the weights are the softmax.
        velocity: Velocity of the optimizer, float64 `[E]`.
        history: Weights at the start and after each epoch.
        collapsed: Whether a weight fell below `LEAST_WEIGHT`, which ended the learning.
    """

    raw: npt.NDArray[np.float64]
    velocity: npt.NDArray[np.float64]
    history: tuple[tuple[float, ...], ...]
    collapsed: bool = False

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """The weights, float64 `[E]`, positive, with a sum of 1."""
        return np.asarray(self.history[-1])


def start(num_experts: int) -> Aggregation:
    """Equal weights."""
    raw = np.full(num_experts, 1 / num_experts)
    return Aggregation(raw, np.zeros(num_experts), (tuple(raw.tolist()),))


def learn_epoch(
    state: Aggregation,
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    learning_rate: float,
    seed: int,
    rows: npt.NDArray[np.integer] | None = None,
) -> Aggregation:
    """One pass over the images of a target distribution, unless the weights have collapsed.

    Args:
        state: State after the epochs before.
        first, second: Logits of two views of each image, float `[E, N, C]`, drawn again for each
            epoch.
        learning_rate: Rate of SGD with Nesterov momentum.
        seed: Seed of the order of the images, another one for each epoch.
        rows: Positions of the target distribution's images among the `N`; None for all.

    Returns:
        The state after the epoch. One that leaves a weight, rounded to two places, below
        `LEAST_WEIGHT` is the last.
    """
    if state.collapsed:
        return state
    rows = np.arange(first.shape[1]) if rows is None else rows
    order = np.random.default_rng(seed).permutation(rows)
    raw, velocity = jnp.asarray(state.raw), jnp.asarray(state.velocity)
    for i in range(0, len(order), BATCH_SIZE):
        chosen = np.sort(order[i : i + BATCH_SIZE])  # so that files are read in order
        batch = (np.asarray(views[:, chosen], np.float32) for views in (first, second))
        raw, velocity = _update(raw, velocity, *batch, learning_rate)
    weights = np.asarray(jax.nn.softmax(raw), np.float64)
    return Aggregation(
        np.asarray(raw, np.float64),
        np.asarray(velocity, np.float64),
        (*state.history, tuple(weights.tolist())),
        collapsed=bool((np.round(weights, 2) < LEAST_WEIGHT).any()),
    )


def instability(raw: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Minus the mean cosine similarity of the predictions for two views, a scalar in [-1, 0].

    Args:
        raw: Raw weights, float `[E]`: the weights are their softmax.
        first, second: Logits of the two views, float `[E, B, C]`.
    """
    weights = jax.nn.softmax(raw)
    p, q = (jax.nn.softmax(jnp.einsum("e,ebc->bc", weights, logits)) for logits in (first, second))
    lengths = jnp.linalg.norm(p, axis=1) * jnp.linalg.norm(q, axis=1)
    return -jnp.mean(jnp.sum(p * q, axis=1) / jnp.maximum(lengths, _NORM_EPSILON))


@jax.jit
def _update(
    raw: jax.Array, velocity: jax.Array, first: jax.Array, second: jax.Array, rate: float
) -> tuple[jax.Array, jax.Array]:
    """A step of SGD as PyTorch makes it, weight decay on the raw weights."""
    gradient = jax.grad(instability)(raw, first, second) + WEIGHT_DECAY * raw
    velocity = MOMENTUM * velocity + gradient
    return raw - rate * (gradient + MOMENTUM * velocity), velocity
