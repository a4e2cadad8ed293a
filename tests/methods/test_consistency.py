# SPDX-License-Identifier: Apache-2.0
"""Consistency self-distillation against slow twins, and where it must vanish."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.losses import log_prior
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.base import Context, Network
from balpoe_jax.methods.mdcs import MDCS, BalPoECS, consistency
from tests.helpers import tiny_network
from tests.helpers.tiny_network import COUNTS, logits_as_images, numeric_gradient

FACTS = Context(COUNTS, taus=(0.0, 1.0, 2.0))


def logits_batch(seed: int = 0, rows: int = 10) -> TrainBatch:
    random = np.random.default_rng(seed)
    batch = tiny_network.batch(rows, seed, np.float64)
    draw = partial(random.normal, size=(rows, 3, len(COUNTS)), scale=2.0)
    return batch._replace(views=tuple(draw() for _ in batch.views))


def with_view(batch: TrainBatch, number: int, images: np.ndarray) -> TrainBatch:
    views = (*batch.views[:number], images, *batch.views[number + 1 :])
    return batch._replace(views=views)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def divergence(batch: TrainBatch, weak: int, strong: int, teacher=None) -> list[float]:
    """Of each expert, in loops; the teacher is that of another batch where one is given."""
    prior = np.asarray(log_prior(COUNTS), np.float64)
    found = []
    for e, tau in enumerate(FACTS.taus):
        terms = []
        for i, label in enumerate(batch.labels):
            w = log_softmax((teacher or batch).views[weak][i, e] + tau * prior)
            s = log_softmax(batch.views[strong][i, e] + tau * prior)
            if w.argmax() == label:
                terms.append(sum(np.exp(a) * (a - b) for a, b in zip(w, s, strict=True)))
        found.append(sum(terms) / max(1, len(terms)))
    return found


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    prior = np.asarray(log_prior(COUNTS), np.float64)
    return np.array(
        [
            [-log_softmax(z + tau * prior)[y] for z, y in zip(logits[:, e], labels, strict=True)]
            for e, tau in enumerate(FACTS.taus)
        ]
    )


def twin(method, batch, epoch: int, teacher) -> float:
    weight = method.mu * min((epoch + 1) / method.warmup_epochs, 1)
    mixed = batch.mix_weight * cross_entropy(batch.images, batch.labels)
    mixed = mixed + (1 - batch.mix_weight) * cross_entropy(batch.images, batch.other_labels)
    if isinstance(method, BalPoECS):
        added = np.mean(divergence(batch, 1, 2, teacher))
        return mixed.mean() + weight * added
    both = (mixed + cross_entropy(batch.views[1], batch.labels)) / 2
    added = np.sum(divergence(batch, 1, 0, teacher))
    return both.mean(axis=1).sum() + weight * added


@pytest.mark.slow_cases("cs")
@pytest.mark.integration
@pytest.mark.parametrize("method", [BalPoECS(0.6, 4), MDCS(0.6, 4)], ids=["cs", "mdcs"])
def test_losses_are_the_twins(method, x64) -> None:
    batch, epoch = logits_batch(), 2
    batch = batch._replace(views=batch.views[: method.views])
    kept = divergence(batch, 1, 2 if method.views == 3 else 0)
    assert min(kept) > 0  # every expert keeps a row

    @jax.jit
    def loss(views):
        given = batch._replace(views=views)
        return method.loss(logits_as_images, {}, given, FACTS.at(jnp.asarray(epoch)))

    views = jax.tree.map(jnp.asarray, batch.views)
    np.testing.assert_allclose(loss(views).total, twin(method, batch, epoch, batch), rtol=1e-6)
    gradients = jax.grad(lambda views: loss(views).total)(views)
    for number, view in enumerate(batch.views):
        expected = numeric_gradient(
            lambda x, number=number: twin(method, with_view(batch, number, x), epoch, batch), view
        )
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(gradients[number], expected, atol=2e-5 * scale)


def test_identical_views_add_nothing() -> None:
    batch = logits_batch()
    logits = jnp.asarray(np.moveaxis(batch.images, 1, 0), jnp.float32)
    value, gradient = jax.value_and_grad(
        lambda strong: consistency(logits, strong, jnp.asarray(batch.labels)).sum()
    )(logits)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros_like(gradient), atol=1e-6)


def test_nothing_is_learnt_from_wrong_predictions() -> None:
    batch = logits_batch()
    logits = jnp.asarray(np.moveaxis(batch.images, 1, 0))
    wrong = (logits.argmax(-1)[0] + 1) % len(COUNTS)
    value, gradient = jax.value_and_grad(
        lambda strong: consistency(logits[:1], strong, wrong).sum()
    )(-logits[:1])
    assert value == 0 and not np.any(gradient)


@pytest.mark.integration
def test_without_weight_it_is_balpoe() -> None:
    """Of a whole network: the loss, its gradient and the statistics; and not with weight."""
    network = tiny_network.experts(3)
    variables = tiny_network.init(network)
    batch = tiny_network.batch()

    @partial(jax.jit, static_argnums=0)
    def step(method, params):
        def loss(params):
            losses = method.loss(
                Network(network, params, variables["batch_stats"]), {}, batch, FACTS
            )
            return losses.total, (losses.by_expert, losses.batch_stats)

        return jax.value_and_grad(loss, has_aux=True)(params)

    expected = step(BalPoE(), variables["params"])
    chex.assert_trees_all_equal(step(BalPoECS(mu=0.0), variables["params"]), expected)
    assert abs(step(BalPoECS(mu=0.6), variables["params"])[0][0] - expected[0][0]) > 1e-3


def test_the_weight_grows_with_the_epoch() -> None:
    weights = [float(BalPoECS(0.6, 20).weight(jnp.asarray(epoch))) for epoch in (0, 9, 19, 50)]
    np.testing.assert_allclose(weights, [0.03, 0.3, 0.6, 0.6], rtol=1e-6)
    assert np.isclose(BalPoECS(0.6, 0).weight(jnp.asarray(0)), 0.6)


@pytest.mark.parametrize("field", ["mu", "warmup_epochs"])
def test_refuses_negative_weights(field: str) -> None:
    with pytest.raises(UserError, match=f"config.method.{field} must be from 0 to 1000000"):
        dataclasses.replace(MDCS(), **{field: -1})
