# SPDX-License-Identifier: Apache-2.0
"""Logit adjustment after training, and what its predictions are equal to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.evaluation.priors import log_target_prior
from balpoe_jax.methods import PRESETS, Context, Network, make_method, settings
from balpoe_jax.methods.logit_adjustment import PostHoc
from balpoe_jax.models import Outputs
from tests.helpers import tiny_network

COUNTS = tiny_network.COUNTS


def random_logits() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(2, 40, 5)).astype(np.float32)


def predicted(tau: float, counts=COUNTS) -> np.ndarray:
    outputs = Outputs(jnp.asarray(random_logits()), jnp.zeros((2, 40, 1)))
    return np.asarray(PostHoc(tau).predict(outputs, {}, Context(counts)).logits)


def test_the_prior_is_taken_out_of_every_experts_logits() -> None:
    expected = random_logits() - 0.5 * np.log(COUNTS / COUNTS.sum())
    np.testing.assert_allclose(predicted(0.5), expected, rtol=1e-5)
    np.testing.assert_array_equal(predicted(0.0), random_logits())


def test_with_the_training_prior_as_the_target_pc_softmax_is_a_plain_argmax() -> None:
    """The target's log prior is what evaluation adds to predictions when it is known."""
    target = log_target_prior(COUNTS / COUNTS.sum(), len(COUNTS))
    compensated = predicted(1.0).mean(axis=0) + np.asarray(target)
    plain = random_logits().mean(axis=0)
    np.testing.assert_array_equal(compensated.argmax(axis=1), plain.argmax(axis=1))
    assert (predicted(1.0).mean(axis=0).argmax(axis=1) != plain.argmax(axis=1)).any()


def test_with_uniform_counts_nothing_changes_but_a_constant() -> None:
    difference = predicted(1.0, np.full(5, 9)) - random_logits()
    np.testing.assert_allclose(difference, np.log(5), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.integration
def test_it_is_trained_as_cross_entropy_is() -> None:
    network = tiny_network.experts(2)
    network = Network(network, **tiny_network.init(network))
    batch = jax.tree.map(jnp.asarray, tiny_network.batch(8, views=1))
    losses = [
        make_method(settings(PRESETS[name].method)).loss(network, {}, batch, Context(COUNTS, taus))
        for name, taus in (("logit_adjustment", (1.0, 1.0)), ("cross_entropy", (0.0, 0.0)))
    ]
    np.testing.assert_allclose(losses[0].by_expert, losses[1].by_expert, rtol=1e-6)


def test_a_tau_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"config.method.tau must be from -100 to 100, got nan"):
        PostHoc(float("nan"))
