# SPDX-License-Identifier: Apache-2.0
"""SADE: its loss against the reference, and the weights that it learns at test time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.evaluation import expert_weights
from balpoe_jax.losses import balpoe_loss, log_prior
from balpoe_jax.methods.sade import expert_biases, reversed_counts, sade_losses
from tests.helpers.golden import cases, golden, max_relative

RANDOM = np.random.default_rng(3)


@pytest.mark.integration
@pytest.mark.parametrize("name", cases("sade"))
def test_the_loss_is_the_references(name: str, x64) -> None:
    case = golden(f"sade/{name}")
    strength = json.loads(str(case["hyper"]))["tau"]
    counts = case["class_counts"]
    if not case["has_ties"] or "stable" in name:
        reversed_prior = reversed_counts(counts) / counts.sum()
        np.testing.assert_allclose(reversed_prior, case["reversed_prior"], rtol=1e-6)
    biases = expert_biases(counts, strength).astype(jnp.float64)
    inverse = jnp.log(jnp.asarray(case["reversed_prior"], jnp.float64) + 1e-9)
    biases = biases.at[2].set(biases[1] - strength * inverse)  # with the stored order of ties

    def loss(logits: jax.Array) -> jax.Array:
        return sade_losses(logits, jnp.asarray(case["labels"]), biases).mean(axis=1).sum()

    logits = jnp.asarray(case["expert_logits"], jnp.float64)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(value, case["loss_f64"], rtol=1e-6)
    assert max_relative(gradient, case["grad"]) <= 2e-5


def test_sizes_are_reversed_by_rank() -> None:
    np.testing.assert_array_equal(reversed_counts(np.array([9, 4, 2, 7])), [2, 7, 9, 4])
    # Equal sizes in their order: the first 5 is the smaller.
    np.testing.assert_array_equal(reversed_counts(np.array([5, 8, 5, 1])), [5, 1, 5, 8])
    exponential = np.array([64, 16, 4, 1])
    np.testing.assert_array_equal(reversed_counts(exponential) * exponential, 64)


@pytest.mark.integration
def test_with_equal_classes_it_is_three_cross_entropies(x64) -> None:
    logits, labels = jnp.asarray(RANDOM.normal(size=(3, 6, 4))), jnp.arange(6) % 4
    losses = sade_losses(logits, labels, expert_biases(np.full(4, 7), 2.0))
    plain = balpoe_loss(logits, labels, log_prior([1, 1, 1, 1]), (0.0, 0.0, 0.0))
    np.testing.assert_allclose(losses.sum(axis=0), 3 * plain, rtol=1e-6)


def views(noise: tuple[float, ...], seed: int, examples: int = 256, classes: int = 4):
    """Logits of two views: each expert sees the class, under noise of its own in each view."""
    random = np.random.default_rng(seed)
    signal = 3 * np.eye(classes)[random.integers(0, classes, examples)]
    shape = (2, len(noise), examples, classes)
    noisy = signal + np.array(noise)[:, None, None] * random.normal(size=shape)
    return noisy[0].astype(np.float32), noisy[1].astype(np.float32)


def learn(noise: tuple[float, ...], epochs: int, rate: float = 1.0) -> expert_weights.Aggregation:
    state = expert_weights.start(len(noise))
    for epoch in range(epochs):
        state = expert_weights.learn_epoch(state, *views(noise, epoch), rate, epoch)
    return state


@pytest.mark.integration
def test_the_weights_go_to_the_optimum_of_a_grid() -> None:
    """Of two experts the sharper one gets what a search over all weights finds the most stable."""
    noise = (2.5, 3.0)
    learnt = learn(noise, 40, rate=3.0)
    all_views = [views(noise, epoch) for epoch in range(40)]
    first, second = (np.concatenate(each, axis=1) for each in zip(*all_views, strict=True))
    grid = np.linspace(0.02, 0.98, 97)
    raw = jnp.log(jnp.stack([grid, 1 - grid], axis=1))
    values = jax.lax.map(lambda r: expert_weights.instability(r, first, second), raw)
    best = grid[int(np.argmin(values))]
    assert 0.5 < best < 0.95
    assert abs(learnt.weights[0] - best) < 0.05
    assert len(learnt.history) == 41 and learnt.history[0] == (0.5, 0.5)


@pytest.mark.slow
def test_identical_views_leave_weight_decay_alone() -> None:
    first, _ = views((1.0, 2.0, 3.0), 0)
    raw = jnp.array([0.3, -0.2, 0.5])
    value, gradient = jax.value_and_grad(expert_weights.instability)(raw, first, first)
    assert value == pytest.approx(-1, abs=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    state = expert_weights.learn_epoch(expert_weights.start(3), first, first, 0.1, 0)
    np.testing.assert_allclose(state.weights, 1 / 3, rtol=1e-4)
    assert (state.raw < 1 / 3).all()


def test_experts_keep_their_weights_when_they_change_places() -> None:
    first, second = views((0.5, 2.0, 4.0), 1)
    order = [2, 0, 1]
    state = expert_weights.learn_epoch(expert_weights.start(3), first, second, 1.0, 5)
    swapped = expert_weights.learn_epoch(
        expert_weights.start(3), first[order], second[order], 1.0, 5
    )
    np.testing.assert_allclose(swapped.weights, state.weights[order], rtol=1e-4)


@pytest.mark.integration
def test_one_step_is_pytorchs_sgd() -> None:
    """By hand: decay joins the gradient, Nesterov looks ahead."""
    first, second = views((1.0, 3.0), 2, examples=100)  # one batch
    raw = np.array([0.5, 0.5])
    gradient = np.asarray(jax.grad(expert_weights.instability)(jnp.asarray(raw), first, second))
    step = gradient + 5e-4 * raw
    state = expert_weights.learn_epoch(expert_weights.start(2), first, second, 0.2, 0)
    np.testing.assert_allclose(state.raw, raw - 0.2 * (step + 0.9 * step), rtol=1e-5)


def test_learning_stops_where_a_weight_collapses() -> None:
    state = learn((0.2, 9.0), 30, rate=20.0)
    assert state.collapsed and state.weights.min() < 0.055
    assert len(state.history) < 31
    again = expert_weights.learn_epoch(state, *views((0.2, 9.0), 0), 1.0, 0)
    assert again is state
