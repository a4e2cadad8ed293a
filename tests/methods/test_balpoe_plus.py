# SPDX-License-Identifier: Apache-2.0
"""BalPoE+ against slow twins, and the mean of its experts' biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.losses import log_prior
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.balpoe_plus import BalPoEPlus, BalPoEPlusCS, class_factors, expert_biases
from balpoe_jax.methods.base import Context
from balpoe_jax.methods.mdcs import BalPoECS
from tests.helpers import tiny_network
from tests.helpers.method_steps import moved
from tests.helpers.tiny_network import COUNTS, logits_as_images

TAUS = (0.0, 0.5, 2.5)
CONTEXT = Context(COUNTS, taus=TAUS)


def logits_batch(views: int = 3, rows: int = 10) -> TrainBatch:
    """A batch whose images are logits `[rows, 3, C]`."""
    random = np.random.default_rng(0)
    shape = (rows, len(TAUS), len(COUNTS))
    images = tuple(random.normal(size=shape, scale=2.0) for _ in range(views))
    return tiny_network.batch(rows, 0, np.float64)._replace(views=images)


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def slow_bias(expert: int, label: int, tail_spread: float) -> float:
    prior = np.asarray(log_prior(COUNTS), np.float64)
    place = (prior.max() - prior[label]) / (prior.max() - prior.min())
    factor = (1 - place) * 1 + place * tail_spread
    mean = sum(TAUS) / len(TAUS)
    return (mean + (TAUS[expert] - mean) * factor) * prior[label]


def slow_loss(method: BalPoEPlusCS, batch: TrainBatch, epoch: int) -> float:
    classes = range(len(COUNTS))
    total = 0.0
    for e in range(len(TAUS)):
        bias = np.array([slow_bias(e, c, method.tail_spread) for c in classes])
        losses, divergences = [], []
        for i, (label, other) in enumerate(zip(batch.labels, batch.other_labels, strict=True)):
            mixed, *others = (softmax(view[i, e] + bias) for view in batch.views)
            share = batch.mix_weight[i]
            losses.append(-share * np.log(mixed[label]) - (1 - share) * np.log(mixed[other]))
            if others and others[0].argmax() == label:
                weak, strong = others
                divergences.append(sum(weak * np.log(weak / strong)))
        weight = method.mu * min((epoch + 1) / method.warmup_epochs, 1)
        total += np.mean(losses) + weight * np.mean(divergences or [0.0])
    return total / len(TAUS)


@pytest.mark.parametrize("tail_spread", [0.0, 1.0, 1.7])
def test_the_mean_of_the_biases_is_the_mean_taus(tail_spread: float, x64) -> None:
    prior = log_prior(COUNTS)
    biases = expert_biases(jnp.asarray(TAUS), prior, tail_spread)
    np.testing.assert_allclose(biases.mean(axis=0), np.mean(TAUS) * prior, rtol=1e-12)
    expected = [[slow_bias(e, c, tail_spread) for c in range(len(COUNTS))] for e in range(3)]
    np.testing.assert_allclose(biases, expected, rtol=1e-6)


def test_factors_go_from_the_most_frequent_class_to_the_rarest() -> None:
    factors = class_factors(log_prior([1000, 100, 10]), 3.0)
    np.testing.assert_allclose(factors, [1, 2, 3], rtol=1e-5)
    np.testing.assert_array_equal(class_factors(log_prior([7, 7, 7]), 3.0), [1, 1, 1])


@pytest.mark.parametrize("tail_spread", [1.0, 1.7])
def test_the_loss_is_the_twins(tail_spread: float, x64) -> None:
    method, batch = BalPoEPlusCS(0.6, 4, tail_spread), logits_batch()
    context = CONTEXT.at(jnp.asarray(2))
    actual = jax.jit(
        lambda views: method.loss(logits_as_images, {}, batch._replace(views=views), context).total
    )(batch.views)
    np.testing.assert_allclose(actual, slow_loss(method, batch, 2), rtol=1e-6)


@pytest.mark.integration
def test_without_spread_it_is_balpoe_with_consistency(x64) -> None:
    batch, context = logits_batch(), CONTEXT.at(jnp.asarray(2))
    for mu in (0.0, 0.6):
        plus, plain = (
            method.loss(logits_as_images, {}, batch, context)
            for method in (BalPoEPlusCS(mu, 4), BalPoECS(mu, 4))
        )
        np.testing.assert_allclose(plus.total, plain.total, rtol=1e-7)
        np.testing.assert_allclose(plus.by_expert, plain.by_expert, rtol=1e-7)


def test_heads_are_trained_without_consistency(x64) -> None:
    batch = logits_batch()
    actual = BalPoEPlusCS(0.6, 4, 1.7).head_loss(logits_as_images, {}, batch, CONTEXT)
    expected = slow_loss(BalPoEPlusCS(0.0, 4, 1.7), batch, 0)
    np.testing.assert_allclose(actual.total, expected, rtol=1e-6)
    assert actual.terms == {}


def test_without_its_parts_it_is_balpoe(x64) -> None:
    batch = logits_batch(views=1)
    plus, plain, spread = (
        method.loss(logits_as_images, {}, batch, CONTEXT)
        for method in (BalPoEPlus(), BalPoE(), BalPoEPlus(1.7))
    )
    np.testing.assert_allclose(plus.by_expert, plain.by_expert, rtol=1e-7)
    expected = slow_loss(BalPoEPlusCS(0.0, 4, 1.7), batch, 0)
    np.testing.assert_allclose(spread.total, expected, rtol=1e-6)


@pytest.mark.integration
def test_the_second_phase_moves_the_heads_alone() -> None:
    paths = moved("balpoe_plus")
    assert paths and all("/head/" in f"/{path}" for path in paths)


def test_a_spread_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match="tail_spread must be from 0 to 10, got 11"):
        BalPoEPlus(tail_spread=11)
