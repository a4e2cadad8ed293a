# SPDX-License-Identifier: Apache-2.0
"""LTWB: its losses, its radius and its projection are slow twins of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.methods import Context
from balpoe_jax.methods.ltwb import (
    LTWB,
    binary_cross_entropies,
    project_classes,
    radius_between,
)
from balpoe_jax.optim import make_optimizer
from balpoe_jax.step import phase_optimizer
from tests.helpers.golden import golden, max_relative
from tests.helpers.method_steps import fresh, moved, run
from tests.helpers.mixed_rows import COUNTS, log_probability, mixed_batch


@pytest.mark.integration
def test_the_losses_are_their_twins(x64) -> None:
    logits, batch = mixed_batch()
    method, context = LTWB(beta=0.99), Context(COUNTS)
    inverse = [(1 - 0.99) / (1 - 0.99**n) for n in COUNTS]
    weights = [3 * value / sum(inverse) for value in inverse]
    plain = method.expert_losses(jnp.asarray(logits), batch, context)
    balanced = method.balanced_losses(jnp.asarray(logits), batch, context)
    for e in range(2):
        for i in range(4):
            shares = ((batch.labels[i], batch.mix_weight[i]),)
            shares += ((batch.other_labels[i], 1 - batch.mix_weight[i]),)
            own = [-share * log_probability(logits[e, i], label) for label, share in shares]
            np.testing.assert_allclose(plain[e, i], sum(own), rtol=1e-12)
            weighted = 0.0
            for label, share in shares:
                for c in range(3):
                    p = np.exp(log_probability(logits[e, i], c))
                    weighted -= share * weights[label] * np.log(p if c == label else 1 - p) / 3
            np.testing.assert_allclose(balanced[e, i], weighted, rtol=1e-12)


@pytest.mark.integration
@pytest.mark.slow_cases("c100")
@pytest.mark.parametrize("name", ["c10", "c100"])
def test_the_balanced_loss_is_the_authors(name: str, x64) -> None:
    case = golden(f"ltwb/{name}")
    labels = case["labels"]
    batch, context = (
        TrainBatch((), labels, labels, np.ones(len(labels))),
        Context(case["class_counts"]),
    )

    def loss(logits: jax.Array) -> jax.Array:
        return LTWB().balanced_losses(logits[None], batch, context).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(case["logits"], jnp.float64))
    np.testing.assert_allclose(value, case["loss_f64"], rtol=1e-9)
    assert max_relative(gradient, case["grad"]) <= 1e-6


@pytest.mark.integration
def test_a_probability_that_rounds_to_one_leaves_loss_and_gradient_finite() -> None:
    """Of the right class and of a wrong one, in single precision."""
    logits = jnp.array([[[60.0, 0.0, 0.0], [0.0, 60.0, 0.0]]])
    loss = lambda z: binary_cross_entropies(z, np.array([0, 0])).sum(axis=0)  # noqa: E731
    np.testing.assert_allclose(loss(logits), [0, (120 - np.log(2)) / 3], rtol=1e-6, atol=1e-6)
    gradient = jax.jacobian(loss)(logits)[1, 0, 1]
    np.testing.assert_allclose(gradient, [-1 / 2, 2 / 3, -1 / 6], rtol=1e-5)


def test_radius_and_projection_are_the_authors(x64) -> None:
    case = golden("ltwb/maxnorm")
    before, moved_to = (np.float64(case[name]).T[None] for name in ("before", "moved"))
    radius = radius_between(jnp.asarray(before), 0.1)
    np.testing.assert_allclose(radius, [case["radius"]], rtol=1e-12)
    found = project_classes(jnp.asarray(moved_to), radius)
    np.testing.assert_allclose(found[0].T, case["projected"], rtol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_radius_lies_between_the_norms(share: float, x64) -> None:
    kernel = np.random.default_rng(2).normal(size=(2, 4, 3))
    for e, found in enumerate(radius_between(jnp.asarray(kernel), share)):
        norms = [np.sqrt((kernel[e, :, c] ** 2).sum()) for c in range(3)]
        expected = min(norms) + share * (max(norms) - min(norms))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_what_lies_outside_of_the_ball_is_scaled_onto_it(x64) -> None:
    kernel, radius = np.random.default_rng(3).normal(size=(2, 4, 3)), np.array([1.5, 0.5])
    found = project_classes(jnp.asarray(kernel), jnp.asarray(radius))
    inside = 0
    for e in range(2):
        for c in range(3):
            norm = np.sqrt((kernel[e, :, c] ** 2).sum())
            inside += norm <= radius[e]
            expected = kernel[e, :, c] * min(1, radius[e] / norm)
            np.testing.assert_allclose(found[e, :, c], expected, rtol=1e-12)
    assert 0 < inside < 6


def test_after_an_update_the_weights_are_the_projected_ones(x64) -> None:
    """Of the optimizer with momentum and weight decay, whose state is as without projection."""
    random = np.random.default_rng(4)
    head = {"dense": {"kernel": random.normal(size=(2, 4, 3)), "bias": random.normal(size=(2, 3))}}
    body = {"kernel": random.normal(size=(2, 4, 4))}
    params = {"ensemble": {"expert": {"head": head, "body": body}}, "radius": np.array([1.2, 2.0])}
    params = jax.tree.map(jnp.asarray, params)
    base = make_optimizer(0.3, weight_decay=0.1)
    optimizer = phase_optimizer(base, LTWB().phases()[1])
    state, plain_state = optimizer.init(params), base.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape)), params)
        plain, plain_state = base.update(grads, plain_state, params)
        updates, state = optimizer.update(grads, state, params)
        jax.tree.map(np.testing.assert_array_equal, state, plain_state)
        new = optax.apply_updates(params, updates)
        free = optax.apply_updates(params, plain)
        kernels = [tree["ensemble"]["expert"]["head"]["dense"]["kernel"] for tree in (new, free)]
        for e, radius in enumerate((1.2, 2.0)):
            for c in range(3):
                norm = np.sqrt((np.asarray(kernels[1][e, :, c]) ** 2).sum())
                expected = kernels[1][e, :, c] * min(1, radius / norm)
                np.testing.assert_allclose(kernels[0][e, :, c], expected, rtol=1e-12, atol=1e-13)
        biases = [tree["ensemble"]["expert"]["head"]["dense"]["bias"] for tree in (new, free)]
        np.testing.assert_array_equal(*biases)
        frozen = [(tree["radius"], tree["ensemble"]["expert"]["body"]) for tree in (new, params)]
        jax.tree.map(np.testing.assert_array_equal, *frozen)
        params = new


def test_the_second_phase_begins_with_the_radius_of_the_first_ones_weights() -> None:
    params = fresh("ltwb").params
    begun = LTWB(radius_share=0.5).phases()[1].begin(params, jax.random.key(0), Context(COUNTS))
    kernel = params["ensemble"]["expert"]["head"]["dense"]["kernel"]
    np.testing.assert_array_equal(begun.pop("radius"), radius_between(kernel, 0.5))
    jax.tree.map(np.testing.assert_array_equal, begun, {"ensemble": params["ensemble"]})


def test_the_second_phase_moves_the_classifier_on_its_balls_and_the_statistics() -> None:
    head = "ensemble/expert/head/dense"
    assert moved("ltwb") == {f"{head}/kernel", f"{head}/bias", "statistics"}
    on_the_ball = 0
    for state, _ in run("ltwb", "pmap", 1, 1):
        kernel = state.params["ensemble"]["expert"]["head"]["dense"]["kernel"]
        norms = np.linalg.norm(kernel, axis=1)
        assert norms.max() <= state.params["radius"] * (1 + 1e-6)
        on_the_ball += np.isclose(norms, 1).sum()
    assert on_the_ball


def test_the_first_phase_leaves_the_radius_alone() -> None:
    np.testing.assert_array_equal(run("ltwb", "pmap", 1, 0)[-1][0].params["radius"], [1.0])


def test_values_that_are_not_valid() -> None:
    with pytest.raises(UserError, match=r"config.method.radius_share must be from 0 to 1, got 1.5"):
        LTWB(radius_share=1.5)
    with pytest.raises(UserError, match=r"config.method.beta must be from 0 to 0.999999999, got 1"):
        LTWB(beta=1.0)
