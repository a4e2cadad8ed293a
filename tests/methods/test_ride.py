# SPDX-License-Identifier: Apache-2.0
"""RIDE's loss against the reference, its divergence, and the router."""

import dataclasses
import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.methods import Context, Network
from balpoe_jax.methods.reweighting import Reweighted
from balpoe_jax.methods.ride import (
    RIDE,
    RoutedOutputs,
    class_temperatures,
    distillation,
    divergence_from_mean,
    prefix_means,
    router_labels,
)
from balpoe_jax.models import Outputs
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config
from tests.helpers.golden import cases, golden, max_relative
from tests.helpers.method_steps import fresh, run

COUNTS = tiny_network.COUNTS
PRESETS_OF_RIDE = ("ride", "ride_router", "ride_distill")


@partial(jax.jit, static_argnums=(0, 1))
def total(method: RIDE, context: Context, labels, epoch: int, logits: jax.Array) -> jax.Array:
    batch = TrainBatch((), labels, labels, jnp.ones(len(labels)))
    own, divergence = method.expert_and_diversity_losses(
        logits, batch, context.at(jnp.asarray(epoch))
    )
    return (own + method.diversity * divergence).sum()


@pytest.mark.parametrize("name", cases("ride"))
def test_the_loss_is_the_references(name: str, x64) -> None:
    case = golden(f"ride/{name}")
    options = json.loads(str(case["hyper"]))
    method = RIDE(
        diversity=options["additional_diversity_factor"],
        reweight_epoch=None if options["reweight_epoch"] == -1 else options["reweight_epoch"],
        temperature_spread=options["reweight_factor"],
    )
    context = Context(case["class_counts"], scale=options["s"])
    # Epochs of the reference count from 1.
    loss = partial(total, method, context, jnp.asarray(case["labels"]), options["epoch"] - 1)
    logits = jnp.asarray(case["expert_logits"], jnp.float64)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(value, case["loss_f64"], rtol=1e-6)
    assert max_relative(gradient, case["grad"]) <= 2e-5


def test_temperatures_are_the_references() -> None:
    case = golden("ride/c10_after")
    found = class_temperatures(case["class_counts"], 0.05)
    np.testing.assert_allclose(found, case["diversity_temperature_weights"], rtol=1e-6)
    np.testing.assert_array_equal(class_temperatures(COUNTS, 0.0), np.ones(5))


def random_logits(experts: int = 3, rows: int = 8) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(11)
    logits = jnp.asarray(2 * random.normal(size=(experts, rows, 5)))
    return logits, jnp.asarray(random.integers(0, 5, rows))


def test_without_a_diversity_factor_every_expert_keeps_its_own_loss(x64) -> None:
    """The released code would take the loss of the mean logits. Margins have the head's scale."""
    logits, labels = random_logits()
    context = Context(COUNTS, scale=3.0)
    batch = TrainBatch((), labels, labels, jnp.ones(8))
    loss = jax.jit(Reweighted("ldam").weighted_means, static_argnums=2)
    expected = loss(logits, batch, context).sum()
    actual = total(RIDE(diversity=0.0), context, labels, 159, logits)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert abs(total(RIDE(diversity=0.0), context, labels, 160, logits) - expected) > 0.1


def test_the_total_is_the_sum_over_experts() -> None:
    logits, labels = random_logits()
    batch = TrainBatch((None,), labels, labels, jnp.ones(8))
    context, method = Context(COUNTS, scale=3.0), RIDE(diversity=-0.3)

    @jax.jit
    def losses():
        network = lambda images: (Outputs(logits, logits), {})  # noqa: E731
        return method.loss(network, {}, batch, context.at(jnp.asarray(160)))  # type: ignore

    found = losses()
    np.testing.assert_allclose(found.total, total(method, context, labels, 160, logits), rtol=1e-5)
    np.testing.assert_allclose(found.total, found.by_expert.sum(), rtol=1e-5)
    expected = found.terms["ldam"] - 0.3 * found.terms["divergence"]
    np.testing.assert_allclose(found.total, expected, rtol=1e-5)


@pytest.mark.integration
def test_experts_that_agree_have_no_divergence_and_the_mean_no_gradient(x64) -> None:
    temperatures = jnp.asarray(class_temperatures(COUNTS, 0.3))
    logits, _ = random_logits()
    same = jnp.broadcast_to(logits[:1], logits.shape)
    np.testing.assert_allclose(divergence_from_mean(same, temperatures), 0, atol=1e-15)
    slope = jax.grad(lambda z: divergence_from_mean(z, temperatures).sum())(same)
    np.testing.assert_allclose(slope, 0, atol=1e-15)
    # Through the mean, every expert's divergence would have a gradient for the others.
    jacobian = jax.jacobian(divergence_from_mean)(logits, temperatures)
    for e in range(3):
        assert np.abs(jacobian[e, e]).max() > 1e-3
        np.testing.assert_array_equal(np.delete(jacobian[e], e, axis=0), 0)


@pytest.mark.integration
def test_prefixes_and_what_a_router_learns_in_loops() -> None:
    logits, labels = random_logits(experts=4, rows=40)
    prefixes = prefix_means(logits)
    found, seen = np.asarray(router_labels(prefixes, labels)), set()
    for row, label in enumerate(labels):
        means = [np.mean(logits[: i + 1, row], axis=0) for i in range(4)]
        np.testing.assert_allclose(prefixes[:, row], means, rtol=1e-5)
        right = [mean.argmax() == label for mean in means]
        for i in range(3):
            assert found[i, row] == (not right[i] and any(right[i + 1 :]))
            seen.add(bool(found[i, row]))
    assert seen == {False, True}


@pytest.mark.integration
def test_prediction_takes_the_experts_up_to_the_first_closed_gate() -> None:
    logits, _ = random_logits(experts=3, rows=4)
    gates = jnp.array([[-1.0, 1.0, 1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])
    outputs = RoutedOutputs(logits, jnp.zeros((3, 4, 2)), gates)
    predicted = RIDE(router=True).predict(outputs, {}, Context(COUNTS))
    np.testing.assert_array_equal(predicted.experts_used, [1, 2, 3, 1])
    for row, used in enumerate([1, 2, 3, 1]):
        expected = logits[:used, row].mean(axis=0)
        np.testing.assert_allclose(predicted.ensemble[row], expected, rtol=1e-5)
    np.testing.assert_array_equal(predicted.logits, logits)


@pytest.mark.integration
def test_the_routers_loss_in_loops() -> None:
    logits, labels = random_logits(experts=3, rows=30)
    gates = np.random.default_rng(4).normal(size=(2, 30))
    outputs = RoutedOutputs(logits, jnp.zeros((3, 30, 2)), jnp.asarray(gates))

    def network(images: None, train: bool):
        return outputs, {"train": train}

    batch = TrainBatch((None,), labels, None, None)
    method = RIDE(router=True, router_positive_weight=7.0)
    found = method.router_loss(network, {}, batch, Context(COUNTS))  # type: ignore
    worth, expected = np.asarray(router_labels(prefix_means(logits), labels)), 0.0
    for i, row in np.ndindex(2, 30):
        p = 1 / (1 + np.exp(-gates[i, row]))
        expected -= (7 * np.log(p) if worth[i, row] else np.log(1 - p)) / 60
    np.testing.assert_allclose(found.total, expected, rtol=1e-5)
    assert worth.any() and found.batch_stats == {"train": False}


@pytest.mark.integration
def test_the_stages_train_either_the_experts_or_the_router() -> None:
    start = fresh("ride_router")
    experts = run("ride_router", "pmap", 1, 0)[-1][0]
    router = run("ride_router", "pmap", 1, 1)[-1][0]
    chex.assert_trees_all_equal(experts.params["router"], start.params["router"])
    chex.assert_trees_all_equal(router.params["ensemble"], start.params["ensemble"])
    chex.assert_trees_all_equal(router.batch_stats, start.batch_stats)
    for state, part in ((experts, "ensemble"), (router, "router")):
        for before, after in zip(
            jax.tree.leaves(start.params[part]), jax.tree.leaves(state.params[part]), strict=True
        ):
            assert (before != after).any()


@pytest.mark.integration
def test_the_distance_to_a_teacher_in_loops(x64) -> None:
    (teacher, student), _ = random_logits(experts=2)
    found = distillation(teacher, student, 1.5)
    for row in range(8):
        p, q = (np.exp(z[row] / 1.5) / np.exp(z[row] / 1.5).sum() for z in (teacher, student))
        np.testing.assert_allclose(found[row], 1.5**2 * (p * np.log(p / q)).sum(), rtol=1e-10)
    np.testing.assert_allclose(distillation(teacher, teacher, 1.5), 0, atol=1e-14)
    slopes = jax.grad(lambda *z: distillation(*z, 1.5).sum(), argnums=(0, 1))(teacher, student)
    assert not slopes[0].any() and slopes[1].any()


def mean_logits(network: Network, batch, train: bool) -> jax.Array:
    return jax.jit(lambda: network(batch.images, train)[0].logits.mean(axis=0))()


@pytest.mark.integration
def test_a_distilled_run_adds_the_teachers_term() -> None:
    batch = jax.tree.map(jnp.asarray, tiny_network.batch(8, views=1))
    module = tiny_network.experts(3)
    student, trained = (Network(module, **tiny_network.init(module, seed)) for seed in (0, 1))
    context = Context(COUNTS, scale=30.0, teacher=trained)

    once = RIDE(distill=True, teacher_weight=0.5)
    methods = RIDE(), once, dataclasses.replace(once, repeat_by_experts=True)

    @jax.jit
    def losses():
        found = [method.loss(student, {}, batch, context) for method in methods]
        return [loss.total for loss in found], found[1].terms["teacher"]

    (plain, distilled, repeated), term = losses()
    expected = distillation(
        mean_logits(trained, batch, False), mean_logits(student, batch, True), 1.5
    ).mean()
    np.testing.assert_allclose(term, expected, rtol=1e-4)
    np.testing.assert_allclose(distilled, plain + 0.5 * expected, rtol=1e-4)
    # The code adds the whole, with the teacher's term, in a loop over the three experts.
    np.testing.assert_allclose(repeated, distilled + distilled + distilled, rtol=1e-6)
    assert RIDE(teacher="x").teacher_run == "" and RIDE(distill=True, teacher="x").teacher_run


def test_the_distilled_recipe_repeats_its_loss() -> None:
    fields = {name: get_config("cifar100_lt", f"method={name}").method for name in PRESETS_OF_RIDE}
    repeats = {name: method.repeat_by_experts for name, method in fields.items()}
    assert repeats == {"ride": False, "ride_router": False, "ride_distill": True}


def test_distillation_needs_a_teacher() -> None:
    with pytest.raises(UserError, match=r"name its workdir with --config.method.teacher=DIR"):
        RIDE(distill=True).network(tiny_network.experts(3), Context(COUNTS))


def test_a_router_needs_experts_to_choose_from() -> None:
    with pytest.raises(UserError, match="it needs at least 2, got 1"):
        RIDE(router=True).network(tiny_network.experts(1), Context(COUNTS))
    with pytest.raises(UserError, match=r"config.method.beta must be from 0 to"):
        RIDE(beta=2.0)


def test_a_second_stage_that_is_not_there_is_refused() -> None:
    config = get_config("digits_lt", "method=ride_router")
    assert len(resolve(config).phases) == 2
    config.method.router = False
    with pytest.raises(UserError, match=r"config.phase2.epochs asks for a second phase, which the"):
        resolve(config)
