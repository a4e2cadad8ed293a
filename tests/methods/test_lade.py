# SPDX-License-Identifier: Apache-2.0
"""LADE: the regulariser against the reference and in loops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.losses import log_prior
from balpoe_jax.methods import PRESETS, Context, Network
from balpoe_jax.methods.lade import LADE, lade_regulariser
from tests.helpers import tiny_network
from tests.helpers.golden import cases, golden, max_relative

COUNTS = tiny_network.COUNTS


@pytest.mark.parametrize("name", cases("lade"))
def test_the_regulariser_is_the_references(name: str, x64) -> None:
    case = golden(f"lade/{name}")
    square = json.loads(str(case["hyper"]))["remine_lambda"]
    targets = jnp.eye(len(case["class_counts"]))[case["labels"]]
    prior = log_prior(case["class_counts"])

    def loss(logits: jax.Array) -> jax.Array:
        return lade_regulariser(logits, targets, prior, square)

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(case["logits"], jnp.float64))
    np.testing.assert_allclose(value, case["loss_f64"], rtol=1e-6)
    assert max_relative(gradient, case["grad"]) <= 2e-5


def random_rows() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    return random.normal(size=(7, 5)), random.integers(0, 4, 7)  # none of the last class


@pytest.mark.integration
def test_the_definition_in_loops(x64) -> None:
    logits, labels = random_rows()
    prior = COUNTS / COUNTS.sum()
    expected = 0.0
    for c in range(5):
        own = [logits[i, c] for i in range(7) if labels[i] == c]
        mean = sum(own) / len(own) if own else 0.0
        bound = np.log(sum(np.exp(logits[i, c]) / (5 * prior[c]) for i in range(7)) / 7)
        expected -= prior[c] * (mean - bound - 0.3 * bound**2)
    actual = lade_regulariser(jnp.asarray(logits), jnp.eye(5)[labels], log_prior(COUNTS), 0.3)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def gradient_by_weight(counts, square: float) -> np.ndarray:
    """The gradient of each class's term, before the prior weighs it."""
    logits, labels = random_rows()
    targets, prior = jnp.eye(5)[labels], log_prior(counts)

    def loss(z: jax.Array) -> jax.Array:
        return lade_regulariser(z, targets, prior, square)

    return np.asarray(jax.grad(loss)(jnp.asarray(logits)) / jnp.exp(prior)[None])


@pytest.mark.integration
def test_the_prior_acts_through_the_square_alone(x64) -> None:
    """Without it the prior of a class is no importance weight."""
    for square, same in ((0.0, True), (0.5, False)):
        found = gradient_by_weight(COUNTS, square)
        unweighted = gradient_by_weight(np.ones(5), square)
        assert np.allclose(found, unweighted, rtol=1e-5) == same


def losses_of(method, taus=(1.0, 1.0)):
    module = tiny_network.experts(2)
    network = Network(module, **tiny_network.init(module))
    batch = jax.tree.map(jnp.asarray, tiny_network.batch(8, views=1))
    return method.loss(network, {}, batch, Context(COUNTS, taus))


@pytest.mark.slow
def test_without_its_regulariser_it_is_balanced_softmax() -> None:
    plain = losses_of(PRESETS["balanced_softmax"].method)
    np.testing.assert_allclose(losses_of(LADE(alpha=0.0)).by_expert, plain.by_expert, rtol=1e-6)
    regularised = losses_of(LADE(alpha=0.3))
    terms = regularised.terms
    np.testing.assert_allclose(terms["balanced_softmax"], plain.total, rtol=1e-6)
    expected = plain.total + 0.3 * terms["regulariser"]
    np.testing.assert_allclose(regularised.total, expected, rtol=1e-6)
    assert abs(regularised.total - plain.total) > 0.01
