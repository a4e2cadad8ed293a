# SPDX-License-Identifier: Apache-2.0
"""Weights of experts, learned from unlabelled images of the test set (SADE, NeurIPS 2022).

An expert that is good at an image says the same of two views of it. So the weights are those with
which the aggregated predictions of two views have the largest mean cosine. Only the weights learn:
the logits of the views are computed beforehand, anew for every epoch since views are drawn anew,
which is equal to sending the gradient through the network and throwing the rest of it away.

This adapts to the very images that are scored, without their labels: results with it are no
results "without a prior". On skewed test sets the weights may collapse onto one expert and lower
the accuracy; the released code stops then, but keeps the weights. Here uniform ones are kept in
that case, unless asked otherwise.
"""

import logging
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from balpoe_jax.errors import UserError
from balpoe_jax.optim import make_optimizer

log = logging.getLogger(__name__)

_COSINE_EPSILON = 1e-6
_WEIGHT_DECAY = 5e-4


class Aggregation(NamedTuple):
    """What was learned.

    Attributes:
        weights: float64 `[E]`, to be used: they sum to 1.
        history: float64 `[epochs, E]`, after each epoch, the last of a collapse included.
        cosines: float64 `[epochs]`, the mean over an epoch's batches of the two views' cosine.
        collapsed: whether a weight fell below the least one, which ended the learning.
    """

    weights: npt.NDArray[np.float64]
    history: npt.NDArray[np.float64]
    cosines: npt.NDArray[np.float64]
    collapsed: bool


def stability(raw_weights: jax.Array, view1: jax.Array, view2: jax.Array) -> jax.Array:
    """The cosine of the aggregated probabilities of two views.

    Args:
        raw_weights: float `[E]`, before the softmax that makes weights of them.
        view1: float `[E, B, C]`, logits.
        view2: likewise.

    Returns:
        float `[B]`.
    """
    weights = jax.nn.softmax(raw_weights)
    p, q = (
        jax.nn.softmax(jnp.einsum("e,ebc->bc", weights, view, precision="highest"))
        for view in (view1, view2)
    )
    norms = jnp.linalg.norm(p, axis=-1) * jnp.linalg.norm(q, axis=-1)
    return (p * q).sum(axis=-1) / jnp.maximum(norms, _COSINE_EPSILON)


def learn_weights(
    views: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]],
    learning_rate: float,
    *,
    batch_size: int = 128,
    least_weight: float = 0.05,
    keep_collapsed: bool = False,
    seed: int = 0,
) -> Aggregation:
    """Learns the weights by SGD from uniform ones, an epoch for each pair of views.

    Nesterov momentum 0.9, weight decay 5e-4 on the raw weights, which start at `1 / E`; batches in
    an order that the seed draws, the last one smaller. As in the released code, learning ends after
    an epoch in which a weight, rounded to two decimals, is below `least_weight`.

    Args:
        views: for each epoch (the authors' 5) the logits of all experts on two randomly augmented
            views of every image, float `[E, N, C]` each; drawn lazily, so that a generator holds
            one pair at a time.
        learning_rate: the authors' 0.1 on CIFAR, 0.025 on ImageNet-LT, 0.2 on iNaturalist.
        batch_size: images.
        least_weight: see above; 0 never ends it.
        keep_collapsed: use the last weights even then.
        seed: of the order.

    Raises:
        UserError (a `ValueError`): no epochs, views that do not fit each other or are not finite.
    """
    optimizer = make_optimizer(learning_rate, weight_decay=_WEIGHT_DECAY)
    random = np.random.default_rng(seed)
    history: list[npt.NDArray[np.float64]] = []
    cosines: list[float] = []
    collapsed, raw, opt_state = False, None, None
    for first, second in views:
        view1, view2 = _checked(first, second)
        num_experts, num_images, _ = view1.shape
        if raw is None:
            raw = jnp.full(num_experts, 1 / num_experts, view1.dtype)
            opt_state = optimizer.init(raw)
        order = random.permutation(num_images)
        raw, opt_state, cosine = _epoch(
            learning_rate, raw, opt_state, view1, view2, order, batch_size
        )
        weights = np.asarray(jax.nn.softmax(raw), np.float64)
        history.append(weights / weights.sum())
        cosines.append(cosine)
        shown = ", ".join(f"{weight:.3f}" for weight in weights)
        log.info("Aggregation, epoch %d: weights %s, cosine %.4f", len(history), shown, cosine)
        if has_collapsed(weights, least_weight):
            collapsed = True
            break
    if not history:
        raise UserError("Aggregation weights need the logits of at least one pair of views.")
    chosen = history[-1]
    if collapsed and not keep_collapsed:
        log.info("The weights have collapsed: uniform ones are used.")
        chosen = np.full_like(chosen, 1 / len(chosen))
    return Aggregation(chosen, np.stack(history), np.array(cosines), collapsed)


def has_collapsed(weights: npt.NDArray[np.floating], least_weight: float) -> bool:
    """Whether one of `[E]` weights, rounded to two decimals, is below the least one."""
    return bool(np.round(weights, 2).min() < least_weight)


def weighted_logits(
    expert_logits: npt.NDArray[np.floating], weights: npt.ArrayLike
) -> npt.NDArray[np.floating]:
    """The logits to predict with, `[N, C]` of `[E, N, C]` and weights `[E]`."""
    return np.einsum("e,enc->nc", np.asarray(weights, expert_logits.dtype), expert_logits)


def _checked(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[jax.Array, jax.Array]:
    view1, view2 = jnp.asarray(first), jnp.asarray(second)
    if view1.ndim != 3 or view1.shape != view2.shape or not view1.size:
        raise UserError(
            "Two views must have logits of one shape [experts, images, classes], got "
            f"{view1.shape} and {view2.shape}."
        )
    if not (jnp.isfinite(view1).all() & jnp.isfinite(view2).all()):
        raise UserError(
            "The logits of the views are not finite: the model has diverged; evaluate an earlier "
            "checkpoint or train with a lower learning rate."
        )
    return view1, view2


def _epoch(
    learning_rate: float,
    raw: jax.Array,
    opt_state: optax.OptState,
    view1: jax.Array,
    view2: jax.Array,
    order: npt.NDArray[np.int64],
    batch_size: int,
) -> tuple[jax.Array, optax.OptState, float]:
    """Updates by all whole batches, compiled as one loop, and by the rest."""
    whole = len(order) // batch_size * batch_size
    batches = [order[:whole].reshape(-1, batch_size), order[whole:].reshape(1, -1)]
    carry, found = (raw, opt_state), []
    for rows in batches:
        if rows.size:
            carry, cosines = _updates(learning_rate, carry, view1, view2, jnp.asarray(rows))
            found.append(np.asarray(cosines, np.float64))
    return *carry, float(np.concatenate(found).mean())


@partial(jax.jit, static_argnums=0)
def _updates(
    learning_rate: float,
    carry: tuple[jax.Array, optax.OptState],
    view1: jax.Array,
    view2: jax.Array,
    batches: jax.Array,
) -> tuple[tuple[jax.Array, optax.OptState], jax.Array]:
    """One update for each row of positions `[batches, b]`; also the cosines before them."""
    optimizer = make_optimizer(learning_rate, weight_decay=_WEIGHT_DECAY)

    def update(
        carry: tuple[jax.Array, optax.OptState], rows: jax.Array
    ) -> tuple[tuple[jax.Array, optax.OptState], jax.Array]:
        raw, opt_state = carry

        def loss(raw: jax.Array) -> jax.Array:
            return -stability(raw, view1[:, rows], view2[:, rows]).mean()

        value, gradient = jax.value_and_grad(loss)(raw)
        updates, opt_state = optimizer.update(gradient, opt_state, raw)
        return (optax.apply_updates(raw, updates), opt_state), -value

    return jax.lax.scan(update, carry, batches)
