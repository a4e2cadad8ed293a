# SPDX-License-Identifier: Apache-2.0
"""Learned weights of experts: a known optimum, symmetries, collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from balpoe_jax.aggregation import has_collapsed, learn_weights, stability, weighted_logits
from balpoe_jax.errors import UserError

IMAGES, CLASSES = 300, 6


def make_views(noises: tuple[float, ...], epochs: int = 5, seed: int = 0) -> list:
    """Two views' logits for each epoch: what experts agree on, and noise of each one's size."""
    random = np.random.default_rng(seed)
    signal = 3 * random.normal(size=(1, IMAGES, CLASSES))
    sizes = np.array(noises)[:, None, None]

    def draw() -> np.ndarray:
        return (signal + sizes * random.normal(size=(len(noises), IMAGES, CLASSES))).astype("f4")

    return [(draw(), draw()) for _ in range(epochs)]


def test_the_cosine_by_hand(x64) -> None:
    (view1, view2), *_ = make_views((1.0, 2.0), epochs=1)
    raw = np.array([0.3, -0.2])
    weights = np.exp(raw) / np.exp(raw).sum()
    expected = []
    for row in range(IMAGES):
        p, q = (np.exp(weights @ view[:, row].astype(float)) for view in (view1, view2))
        expected.append(p @ q / np.sqrt((p @ p) * (q @ q)))
    found = stability(jnp.asarray(raw), jnp.asarray(view1, float), jnp.asarray(view2, float))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_known_optimum_is_found() -> None:
    """Of two experts, where one number says it all, over the same views again and again."""
    (pair,) = make_views((1.0, 1.5), epochs=1)
    view1, view2 = map(jnp.asarray, pair)
    loss = jax.jit(lambda x: -stability(jnp.stack([x, 0.0]), view1, view2).mean())
    best = minimize_scalar(lambda x: float(loss(x)), bounds=(-6, 6), method="bounded").x
    expected = 1 / (1 + np.exp(-best))
    assert 0.55 < expected < 0.9
    found = learn_weights([pair] * 40, 1.0, batch_size=IMAGES)
    np.testing.assert_allclose(found.weights, [expected, 1 - expected], atol=0.02)
    assert not found.collapsed and found.cosines[-1] > found.cosines[0]
    np.testing.assert_array_equal(found.weights, found.history[-1])


def reference(views, learning_rate: float, batch_size: int) -> np.ndarray:
    """The update written out, with gradients by differences."""
    random, num_experts = np.random.default_rng(0), len(views[0][0])
    w, momentum = np.full(num_experts, 1 / num_experts), np.zeros(num_experts)
    loss = jax.jit(lambda w, a, b: -stability(w, a, b).mean())
    for view1, view2 in views:
        order = random.permutation(IMAGES)
        for start in range(0, IMAGES, batch_size):
            rows = order[start : start + batch_size]
            a, b = (jnp.asarray(view[:, rows], float) for view in (view1, view2))
            step = np.eye(num_experts) * 1e-5
            slope = [(loss(w + d, a, b) - loss(w - d, a, b)) / 2e-5 for d in step]
            gradient = np.array(slope) + 5e-4 * w
            momentum = 0.9 * momentum + gradient
            w = w - learning_rate * (gradient + 0.9 * momentum)
    return np.exp(w) / np.exp(w).sum()


def test_the_updates_written_out(x64) -> None:
    """Batches of 128 and the rest, Nesterov momentum across epochs, weight decay."""
    views = [tuple(view.astype(float) for view in pair) for pair in make_views((0.5, 1.0, 2.0), 2)]
    found = learn_weights(views, 0.1)
    np.testing.assert_allclose(found.weights, reference(views, 0.1, 128), rtol=1e-6)
    assert found.weights[0] > found.weights[1] > found.weights[2]


def test_identical_views_move_nothing_but_the_weights_decay(x64) -> None:
    view = make_views((0.5, 1.0, 2.0), 1)[0][0].astype(float)
    found = learn_weights([(view, view)] * 3, 0.1)
    np.testing.assert_allclose(found.cosines, 1, rtol=1e-12)
    # The decay of equal raw weights leaves them equal.
    np.testing.assert_allclose(found.history, 1 / 3, rtol=1e-9)
    unequal = jnp.array([0.5, 0.1, -0.3])
    slope = jax.grad(lambda raw, a, b: stability(raw, a, b).mean())
    np.testing.assert_allclose(slope(unequal, view, view), 0, atol=1e-15)
    assert np.abs(slope(unequal, view, view[:, ::-1])).max() > 1e-3


def test_a_permutation_of_experts_permutes_the_weights() -> None:
    views, order = make_views((0.5, 1.0, 2.0), 2), [2, 0, 1]
    found = learn_weights(views, 0.1)
    permuted = learn_weights([(a[order], b[order]) for a, b in views], 0.1)
    np.testing.assert_allclose(permuted.weights, found.weights[order], rtol=1e-4)


def test_collapsed_weights_are_refused_unless_asked_for(caplog) -> None:
    views = make_views((0.05, 3.0, 6.0), 5)
    caplog.set_level("INFO")
    found = learn_weights(views, 5.0)
    assert found.collapsed and len(found.history) < 5
    np.testing.assert_allclose(found.weights, 1 / 3)
    assert found.history[-1].min() < 0.05
    assert "Aggregation, epoch 1: weights 0." in caplog.text and "collapsed" in caplog.text
    kept = learn_weights(views, 5.0, keep_collapsed=True)
    np.testing.assert_array_equal(kept.weights, kept.history[-1])
    assert not learn_weights(views, 5.0, least_weight=0.0).collapsed


def test_weights_are_rounded_before_they_are_judged() -> None:
    assert has_collapsed(np.array([0.044, 0.956]), 0.05)
    assert not has_collapsed(np.array([0.046, 0.954]), 0.05)


def test_weighted_logits() -> None:
    logits = make_views((1.0, 2.0), 1)[0][0]
    expected = 0.25 * logits[0] + 0.75 * logits[1]
    np.testing.assert_allclose(weighted_logits(logits, [0.25, 0.75]), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([], "at least one pair of views"),
        ([(np.zeros((3, 4, 5)), np.zeros((3, 5, 5)))], r"got \(3, 4, 5\) and \(3, 5, 5\)"),
        ([(np.full((3, 4, 5), np.nan), np.zeros((3, 4, 5)))], "not finite"),
    ],
)
def test_views_that_do_not_fit_are_refused(views, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learn_weights(views, 0.1)
