# SPDX-License-Identifier: Apache-2.0
"""SADE's loss against the reference, and its reversed prior."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_network
from golden import cases, golden, max_relative

from balpoe_jax.errors import UserError
from balpoe_jax.methods import Facts
from balpoe_jax.methods.sade import SADE, expert_losses, log_biases, reversed_prior
from balpoe_jax.models import Outputs

COUNTS = tiny_network.COUNTS


@pytest.mark.parametrize("name", cases("sade"))
def test_the_loss_is_the_references(name: str, x64) -> None:
    case = golden(f"sade/{name}")
    targets = jnp.eye(len(case["class_counts"]))[case["labels"]]
    biases = log_biases(case["class_counts"], 2.0)

    def loss(logits: jax.Array) -> jax.Array:
        return expert_losses(logits, targets, biases).mean(axis=1).sum()

    logits = jnp.asarray(case["expert_logits"], jnp.float64)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(value, case["loss_f64"], rtol=1e-6)
    assert max_relative(gradient, case["grad"]) <= 2e-5
    prior = case["class_counts"] / case["class_counts"].sum()
    np.testing.assert_allclose(reversed_prior(prior), case["reversed_prior"], rtol=1e-6)


def test_the_reversed_prior_swaps_ranks() -> None:
    np.testing.assert_array_equal(reversed_prior([5, 1, 9, 3]), [3, 9, 1, 5])
    prior = np.array([0.1, 0.2, 0.1, 0.6])
    np.testing.assert_array_equal(np.sort(reversed_prior(prior)), np.sort(prior))


def test_with_uniform_counts_all_are_cross_entropy(x64) -> None:
    random = np.random.default_rng(1)
    logits, labels = jnp.asarray(random.normal(size=(3, 6, 5))), random.integers(0, 5, 6)
    actual = expert_losses(logits, jnp.eye(5)[labels], log_biases(np.ones(5), 2.0))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, np.tile(labels, (3, 1)))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_total_is_the_sum_over_experts() -> None:
    random = np.random.default_rng(1)
    logits, labels = jnp.asarray(random.normal(size=(3, 6, 5))), jnp.arange(6) % 5
    batch = {"images": None, "labels": labels, "other_labels": labels, "weight": jnp.ones(6)}

    def network(images: None):
        return Outputs(logits, logits), {}

    found = SADE().loss(network, {}, batch, Facts(COUNTS), jnp.asarray(0))  # type: ignore
    expected = expert_losses(logits, jnp.eye(5)[labels], log_biases(COUNTS, 2.0)).mean(axis=1)
    np.testing.assert_allclose(found.by_expert, expected, rtol=1e-5)
    np.testing.assert_allclose(found.total, expected.sum(), rtol=1e-5)


def test_it_has_three_experts() -> None:
    with pytest.raises(UserError, match="The method sade has 3 experts, got 2; leave"):
        SADE().network(tiny_network.experts(2), Facts(COUNTS))
    assert SADE().target_taus((0.0, 1.0, 2.0)) == (0.0, 1.0, None)
