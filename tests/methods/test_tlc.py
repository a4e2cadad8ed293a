# SPDX-License-Identifier: Apache-2.0
"""TLC: the algebra of opinions, the divergence against SciPy, the loss against a twin in loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import class_balanced_weights, ldam_margins
from balpoe_jax.methods import Context
from balpoe_jax.methods.evidence import Opinion, divergence_from_uniform, fuse, opinion
from balpoe_jax.methods.ride import class_temperatures
from balpoe_jax.methods.tlc import TLC, fused, remaining_uncertainty
from balpoe_jax.models import Outputs
from tests.helpers.tiny_network import COUNTS, logits_as_images

RANDOM = np.random.default_rng(13)


def random_opinions(*shape: int) -> Opinion:
    return opinion(jnp.asarray(RANDOM.exponential(size=shape, scale=3.0)))


def test_masses_sum_up_to_one(x64) -> None:
    first, second = random_opinions(6, 5), random_opinions(6, 5)
    for each in (first, second, fuse(first, second), fuse(fuse(first, second), first)):
        np.testing.assert_allclose(each.belief.sum(axis=-1) + each.uncertainty, 1, rtol=1e-12)
        np.testing.assert_allclose(each.mean.sum(axis=-1), 1, rtol=1e-12)
        assert (np.asarray(each.belief) >= 0).all()


def test_fusion_is_commutative_and_the_vacuous_opinion_is_neutral(x64) -> None:
    first, second = random_opinions(6, 5), random_opinions(6, 5)
    for one, other in zip(fuse(first, second), fuse(second, first), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    vacuous = opinion(jnp.zeros((6, 5)))
    np.testing.assert_array_equal(vacuous.uncertainty, 1)
    for one, other in zip(fuse(first, vacuous), first, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    # And associative, so that the order of experts does not matter.
    left, right = fuse(fuse(first, second), first), fuse(first, fuse(second, first))
    np.testing.assert_allclose(left.belief, right.belief, rtol=1e-9)


def test_agreeing_opinions_grow_more_certain() -> None:
    one = opinion(jnp.array([9.0, 1.0, 0.0]))
    both = fuse(one, one)
    assert both.uncertainty < one.uncertainty and both.belief[0] > one.belief[0]


@pytest.mark.integration
def test_the_divergence_is_scipys(x64) -> None:
    a = 1 + RANDOM.exponential(size=(7, 5), scale=[[0.01], [0.1], [1], [10], [1e2], [1e4], [1e6]])
    total, psi = a.sum(axis=1, keepdims=True), scipy.special.digamma
    logs = scipy.special.gammaln(total[:, 0]) - scipy.special.gammaln(a).sum(axis=1)
    expected = logs - scipy.special.gammaln(5) + ((a - 1) * (psi(a) - psi(total))).sum(axis=1)
    np.testing.assert_allclose(divergence_from_uniform(jnp.asarray(a)), expected, rtol=1e-7)
    np.testing.assert_allclose(divergence_from_uniform(jnp.ones((2, 5))), 0, atol=1e-12)


@pytest.mark.integration
def test_remaining_uncertainty_is_the_papers_recursion(x64) -> None:
    opinions = random_opinions(4, 4, 5)
    remaining = remaining_uncertainty(opinions)
    b, u = np.asarray(opinions.belief), np.asarray(opinions.uncertainty)
    for i in range(4):
        expected = [1, u[0, i]]
        for e in (1, 2):
            masses = np.outer(b[e - 1, i], b[e, i])
            conflict = masses.sum() - np.trace(masses)
            expected.append(expected[-1] * u[e, i] / (1 - conflict))
        np.testing.assert_allclose(remaining[:, i], expected, rtol=1e-12)


def kl(p, q) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def softmax(z) -> np.ndarray:
    exponentials = np.exp(np.asarray(z) - np.max(z))
    return exponentials / exponentials.sum()


@pytest.mark.integration
@pytest.mark.parametrize("epoch", [2, 3])
def test_the_loss_is_its_twin(epoch: int, x64) -> None:
    method = TLC(reweight_epoch=3, kl_epochs=50, diversity=0.2)
    context = Context(COUNTS, scale=2.0)
    logits, labels = RANDOM.normal(size=(3, 6, 5), scale=1.5), np.array([0, 1, 2, 3, 4, 0])
    remaining = np.asarray(remaining_uncertainty(opinion(jnp.exp(jnp.asarray(logits)))))
    found = method.row_losses(
        jnp.asarray(logits),
        jnp.asarray(labels),
        jnp.asarray(remaining),
        context.at(jnp.asarray(epoch)),
    )
    weights, temperatures = np.ones(5), np.ones(5)
    if epoch >= 3:
        weights = class_balanced_weights(COUNTS, method.beta)
        temperatures = class_temperatures(COUNTS, method.temperature_spread)
    margins = ldam_margins(COUNTS, method.max_margin) * 2.0
    for i, y in enumerate(labels):
        gates = softmax(remaining[:, i] / method.sharpness)
        combined = sum(g * z for g, z in zip(gates, logits[:, i], strict=True))
        for e in range(3):
            z = logits[e, i].copy()
            z[y] -= margins[y]
            evidence = np.exp(z)
            total = weights[y] * (math.log(evidence.sum()) - math.log(evidence[y]))
            concentration = evidence + 1
            concentration[y] = 1
            uniform = float(divergence_from_uniform(jnp.asarray(concentration)))
            total += (epoch + 1) / 50 * uniform
            apart = kl(softmax(combined / temperatures), softmax(logits[e, i] / temperatures))
            total -= 0.2 * temperatures.mean() ** 2 * apart
            np.testing.assert_allclose(found[e, i], total, rtol=1e-6)


def test_later_experts_learn_from_what_earlier_ones_are_uncertain_of(x64) -> None:
    """The whole loss, an expert and an image at a time."""
    method, context = TLC(engagement=0.6, kl_epochs=50), Context(COUNTS, scale=2.0)
    images, labels = RANDOM.normal(size=(6, 3, 5), scale=2), np.array([0, 1, 2, 3, 4, 0])
    batch = TrainBatch((jnp.asarray(images),), jnp.asarray(labels), None, None)

    @jax.jit
    def compute(batch):
        logits = jnp.moveaxis(batch.images, 1, 0)
        remaining = remaining_uncertainty(opinion(jnp.exp(logits)))
        by_row = method.row_losses(logits, batch.labels, remaining, context.at(jnp.asarray(1)))
        found = method.loss(logits_as_images, {}, batch, context.at(jnp.asarray(1)))
        return found, remaining, by_row

    found, remaining, by_row = jax.device_get(compute(batch))
    for e in range(3):
        chosen = [i for i in range(6) if remaining[e, i] > 0.6 * max(remaining[e])]
        assert len(chosen) == 6 if e == 0 else 0 < len(chosen) < 6
        expected = sum(by_row[e, i] for i in chosen) / len(chosen)
        np.testing.assert_allclose(found.by_expert[e], expected, rtol=1e-9)
        if e:
            assert found.terms[f"engaged_{e + 1}"] == pytest.approx(len(chosen) / 6)
    np.testing.assert_allclose(found.total, sum(found.by_expert), rtol=1e-9)


@pytest.mark.integration
@pytest.mark.parametrize("extreme", [30.0, -30.0])
def test_gradients_are_finite_at_extreme_logits(extreme: float) -> None:
    """In single precision, of experts that are certain of a wrong class, or of the right one."""
    method, context = TLC(reweight_epoch=0, kl_epochs=10), Context(COUNTS, scale=30.0)
    logits = jnp.full((3, 2, 5), -30.0).at[:, :, 1].set(extreme).at[0, 0, 2].set(30.0)
    labels = jnp.array([0, 1])

    def loss(logits):
        remaining = remaining_uncertainty(opinion(jnp.exp(jax.lax.stop_gradient(logits))))
        return method.row_losses(logits, labels, remaining, context.at(jnp.asarray(5))).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.integration
def test_the_prediction_is_the_fused_mean() -> None:
    logits = jnp.asarray(RANDOM.normal(size=(3, 4, 5), scale=6), jnp.float32)
    predicted = TLC().predict(Outputs(logits, logits), {}, Context(COUNTS))
    assert predicted.ensemble is not None
    probabilities = np.exp(predicted.ensemble)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(probabilities, fused(opinion(jnp.exp(logits))).mean, rtol=1e-5)
    # Of one image alone it is the same: no other image of the batch is asked.
    alone = TLC().predict(Outputs(logits[:, :1], logits), {}, Context(COUNTS)).ensemble
    np.testing.assert_allclose(alone, predicted.ensemble[:1], rtol=1e-5)
    certain = jnp.full((3, 1, 5), -30.0).at[0, 0, 1].set(30.0).at[1, 0, 2].set(30.0)
    contrary = TLC().predict(Outputs(certain, certain), {}, Context(COUNTS)).ensemble
    assert np.isfinite(contrary).all()
