# SPDX-License-Identifier: Apache-2.0
"""MiSLAS: smoothing and its limits, and what each phase leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.methods import Context, Network
from balpoe_jax.methods.mislas import SHAPES, Mislas, label_aware_smoothing, label_smoothing
from balpoe_jax.optim import make_optimizer
from balpoe_jax.step import phase_optimizer
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config
from tests.helpers.method_steps import fresh, run

COUNTS = np.array([500, 7, 120, 30, 7])


@pytest.mark.parametrize("shape", SHAPES)
def test_smoothing_rises_with_the_class_from_tail_to_head(shape: str) -> None:
    smoothing = label_smoothing(COUNTS, 0.4, 0.1, shape)
    np.testing.assert_allclose(smoothing[[0, 1, 4]], [0.4, 0.1, 0.1], rtol=1e-12)
    assert smoothing[1] < smoothing[3] < smoothing[2] < smoothing[0]
    bend = smoothing[3] - label_smoothing(COUNTS, 0.4, 0.1, "linear")[3]
    assert np.sign(bend) == {"concave": 1, "linear": 0, "convex": -1}[shape]


def test_the_concave_curve_is_the_papers() -> None:
    expected = 0.1 + 0.3 * np.sin(np.pi * (COUNTS - 7) / (2 * (500 - 7)))
    np.testing.assert_allclose(label_smoothing(COUNTS, 0.4, 0.1), expected, rtol=1e-12)
    np.testing.assert_array_equal(label_smoothing(np.array([3, 3]), 0.4, 0.1), [0.4, 0.4])


@pytest.mark.integration
def test_label_aware_smoothing_is_cross_entropy_with_smoothed_labels(x64) -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(6, 5)), np.array([0, 1, 2, 3, 4, 0])
    smoothing = label_smoothing(COUNTS, 0.4, 0.1)
    soft = np.stack(
        [(1 - smoothing[y]) * np.eye(5)[y] + smoothing[y] / 5 for y in labels]  # loop-written twin
    )
    expected = optax.softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(soft))
    losses = label_aware_smoothing(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(smoothing))
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    plain = label_aware_smoothing(jnp.asarray(logits), jnp.asarray(labels), jnp.zeros(5))
    expected = optax.softmax_cross_entropy_with_integer_labels(
        jnp.asarray(logits), jnp.asarray(labels)
    )
    np.testing.assert_allclose(plain, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "head", "tail", "rate", "shifts"),
    [
        ("cifar10_lt:ir=100", 0.3, 0.0, 0.5, False),
        ("cifar10_lt:ir=50", 0.2, 0.0, 0.2, False),
        ("cifar10_lt:ir=10", 0.1, 0.0, 0.2, False),
        ("cifar100_lt:ir=100", 0.4, 0.1, 0.2, True),
        ("cifar100_lt:ir=50", 0.3, 0.0, 0.1, True),
        ("cifar100_lt:ir=10", 0.2, 0.0, 0.1, True),
        ("imagenet_lt:", 0.3, 0.0, 0.05, True),
        ("inaturalist2018:", 0.3, 0.0, 0.05, True),
    ],
)
def test_the_second_stage_is_the_authors(arguments, head, tail, rate, shifts) -> None:
    """Their configuration files, one for each ratio."""
    name, _, arguments = arguments.partition(":")
    config = get_config(name, ",".join(filter(None, [arguments, "method=mislas"])))
    method = config.method
    assert (method.smooth_head, method.smooth_tail, method.classifier_rate) == (head, tail, rate)
    assert method.shift_statistics == shifts
    assert (config.phase2.epochs, config.phase2.learning_rate) == (10, 0.1)


@pytest.mark.integration
@pytest.mark.parametrize("shifts", [True, False])
def test_statistics_shift_or_stay(shifts: bool) -> None:
    """Where they stay, the network sees images as in a test, too."""
    method = Mislas(shift_statistics=shifts)
    network = method.network(tiny_network.experts(1), None)
    variables = tiny_network.init(network)
    net = Network(network, **variables)
    batch = jax.tree.map(jnp.asarray, tiny_network.batch(8, views=1))

    @jax.jit
    def tune():
        found = method.phases()[1].loss(net, {}, batch, Context(tiny_network.COUNTS, scale=30.0))
        return found, net(batch.images, train=shifts)[0].logits

    found, logits = tune()
    same = jax.tree.map(np.array_equal, found.batch_stats, variables["batch_stats"])
    assert not any(jax.tree.leaves(same)) if shifts else all(jax.tree.leaves(same))
    losses = method.tuning_losses(logits, batch, Context(tiny_network.COUNTS))
    np.testing.assert_allclose(found.total, losses.mean(), rtol=1e-5)


def changed(phase: int) -> dict[str, bool]:
    """Which parameters, and whether any statistic, a phase has changed."""
    before, after = fresh("mislas"), run("mislas", "pmap", 1, phase)[-1][0]
    paths = jax.tree_util.tree_flatten_with_path(before.params)[0]
    found = {
        "/".join(key.key for key in keys): not np.array_equal(leaf, new)
        for (keys, leaf), new in zip(paths, jax.tree.leaves(after.params), strict=True)
    }
    statistics = jax.tree.map(np.array_equal, before.batch_stats, after.batch_stats)
    found["statistics"] = not any(jax.tree.leaves(statistics))
    return found


def test_the_first_stage_trains_all_but_the_scales() -> None:
    found = changed(0)
    assert not found.pop("class_scale")
    assert all(found.values())


def test_the_second_stage_moves_classifier_scales_and_statistics_alone() -> None:
    found = changed(1)
    moved = {name for name, moves in found.items() if moves}
    assert moved == {"class_scale", "statistics"} | {n for n in found if "/head/" in n}
    assert len(moved) < len(found)


@pytest.mark.integration
def test_the_classifier_learns_at_its_own_rate() -> None:
    """To the bit: an update of the head is the common one times the factor."""
    params = tiny_network.init(Mislas().network(tiny_network.experts(1), None))["params"]
    grads = jax.tree.map(lambda x: x + 0.3, params)
    base = make_optimizer(0.1)
    plain, state = base.update(grads, base.init(params), params)
    tuned = phase_optimizer(base, Mislas(classifier_rate=0.2).phases()[1])
    found, new_state = tuned.update(grads, tuned.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)
    np.testing.assert_array_equal(found["class_scale"], plain["class_scale"])
    head, expected = (x["ensemble"]["expert"].pop("head")["kernel"] for x in (found, plain))
    np.testing.assert_array_equal(head, expected * 0.2)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found["ensemble"]))


def test_a_classifier_without_a_rate_is_frozen() -> None:
    trainable = Mislas(classifier_rate=0.0).phases()[1].trainable
    assert trainable("class_scale") and not trainable("ensemble/expert/head/kernel")


@pytest.mark.integration
def test_scales_of_one_change_nothing_and_scale_the_bias_too() -> None:
    ensemble = tiny_network.experts(1, classifier="linear")
    network = Mislas().network(ensemble, None)
    variables = tiny_network.init(network)
    images = tiny_network.batch().images
    inner = {name: tree["ensemble"] for name, tree in variables.items()}
    plain = ensemble.apply(inner, images, train=False).logits
    np.testing.assert_array_equal(network.apply(variables, images, train=False).logits, plain)
    variables["params"]["class_scale"] = jnp.arange(5.0)
    scaled = network.apply(variables, images, train=False).logits
    np.testing.assert_allclose(scaled, np.asarray(plain) * np.arange(5.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"smooth_head": 1.5}, "config.method.smooth_head must be from 0 to 1, got 1.5"),
        ({"smooth_shape": "round"}, "must be one of concave, linear, convex; got 'round'"),
        (
            {"classifier_rate": -1.0},
            "classifier_rate must be from 0 to 1000000, got -1",
        ),
    ],
)
def test_values_that_are_not_valid(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mislas(**fields)
