# SPDX-License-Identifier: Apache-2.0
"""LOS: its labels are the paper's, and its second phase trains a new classifier alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.methods import Context
from balpoe_jax.methods.base import map_by_path
from balpoe_jax.methods.classifier import in_classifier
from balpoe_jax.methods.los import LOS
from tests.helpers.golden import golden, max_relative
from tests.helpers.method_steps import fresh, moved
from tests.helpers.mixed_rows import COUNTS, log_probability, mixed_batch


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.98])
def test_the_losses_are_their_twins(delta: float, x64) -> None:
    logits, batch = mixed_batch()
    method, context = LOS(delta=delta), Context(COUNTS)
    plain = method.expert_losses(jnp.asarray(logits), batch, context)
    smoothed = method.smoothed_losses(jnp.asarray(logits), batch, context)
    for e in range(2):
        for i in range(4):
            target, label = np.zeros(3), np.zeros(3)
            weight = batch.mix_weight[i]
            for y, share in ((batch.labels[i], weight), (batch.other_labels[i], 1 - weight)):
                label[y] += share
                for c in range(3):
                    own = 1 - delta if c == y else 0
                    target[c] += share * (own + delta / 3)
            logs = np.array([log_probability(logits[e, i], c) for c in range(3)])
            np.testing.assert_allclose(plain[e, i], -(label * logs).sum(), rtol=1e-12)
            np.testing.assert_allclose(smoothed[e, i], -(target * logs).sum(), rtol=1e-12)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["c10", "c100"])
def test_the_smoothed_loss_is_the_one_of_the_authors_code(name: str, x64) -> None:
    """Which is PyTorch's, with a smoothing of 0.98."""
    case = golden(f"los/{name}")
    labels, logits = case["labels"], jnp.asarray(case["logits"], jnp.float64)
    batch = TrainBatch((), labels, labels, np.ones(len(labels)))
    context = Context(np.full(logits.shape[1], 5))
    loss = lambda z: LOS().smoothed_losses(z[None], batch, context).mean()  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, case["loss_f64"], rtol=1e-9)
    assert max_relative(gradient, case["grad"]) <= 1e-6


@pytest.mark.integration
def test_a_label_of_a_hundred_classes_is_a_little_above_the_others(x64) -> None:
    """The gradient of uniform logits, which is their probability less the label's share."""
    labels = np.array([7])
    batch = TrainBatch((), labels, labels, np.ones(1))
    context = Context(np.full(100, 5))
    loss = lambda z: LOS().smoothed_losses(z, batch, context).sum()  # noqa: E731
    shares = 0.01 - jax.grad(loss)(jnp.zeros((1, 1, 100)))[0, 0]
    np.testing.assert_allclose(shares[7], 0.02 + 0.0098, rtol=1e-12)
    np.testing.assert_allclose(np.delete(shares, 7), 0.0098, rtol=1e-12)


def test_the_second_phase_begins_with_a_new_classifier_or_goes_on() -> None:
    params, key = fresh("los").params, jax.random.key(3)
    new = LOS(new_classifier=True).phases()[1].begin(params, key, Context(COUNTS))
    same = map_by_path(lambda path, _: path, params)
    for path, old, now in zip(*map(jax.tree.leaves, (same, params, new)), strict=True):
        assert np.array_equal(old, now) != in_classifier(path), path
    assert LOS().phases()[1].begin(params, key, Context(COUNTS)) is params


def test_the_second_phase_moves_the_classifier_and_the_statistics_alone() -> None:
    assert moved("los") == {
        "expert/head/dense/kernel",
        "expert/head/dense/bias",
        "statistics",
    }


def test_a_delta_that_is_not_valid() -> None:
    with pytest.raises(UserError, match=r"config.method.delta must be from 0 to 1, got 1.1"):
        LOS(delta=1.1)
