# SPDX-License-Identifier: Apache-2.0
"""Class weights, focal loss, margins: the reference's numbers, the switch, mixed rows."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balpoe_jax.data.long_tail import exponential_counts
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.losses import class_balanced_weights, focal_loss, ldam_margins
from balpoe_jax.methods import PRESETS, Context
from balpoe_jax.methods.reweighting import FOCAL_PROBABILITIES, Reweighted
from tests.helpers.config_files import get_config
from tests.helpers.golden import cases, golden, max_relative

COUNTS = np.array([500, 120, 30, 8, 2])


def whole(labels) -> TrainBatch:
    """A batch that is not mixed."""
    labels = jnp.asarray(labels)
    return TrainBatch((), labels, labels, jnp.ones(len(labels)))


def loss_and_gradient(method: Reweighted, case, epoch: int, scale: float = 1.0):
    context = Context(case["class_counts"], scale=scale)

    def total(logits: jax.Array) -> jax.Array:
        return method.weighted_means(logits[None], whole(case["labels"]), context.at(epoch))[0]

    return jax.jit(jax.value_and_grad(total))(jnp.asarray(case["logits"], jnp.float64))


CLASS_BALANCED = {"weights": "class_balanced"}
METHODS = {
    "reweighted_ce": (Reweighted(**CLASS_BALANCED), 1.0),
    "focal/c10_g1": (Reweighted("focal"), 1.0),
    "focal/extreme80_g2": (Reweighted("focal", gamma=2.0), 1.0),
    "ldam/c10_s30_nodrw": (Reweighted("ldam"), 30.0),
    "ldam": (Reweighted("ldam", reweight_epoch=160, **CLASS_BALANCED), 30.0),
}


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (loss, name)
        for loss in ("reweighted_ce", "focal", "ldam")
        for name in cases(loss)
        if name != "c10_g2_weighted"
    ],  # whose weights are its own, see below
)
def test_losses_are_the_references(loss: str, name: str, x64) -> None:
    case = golden(f"{loss}/{name}")
    method, scale = METHODS.get(f"{loss}/{name}") or METHODS[loss]
    # Epochs of the reference count from 1.
    epoch = json.loads(str(case["hyper"])).get("epoch", 1) - 1
    value, gradient = loss_and_gradient(method, case, epoch, scale)
    np.testing.assert_allclose(value, case["loss_f64"], rtol=1e-6)
    assert max_relative(gradient, case["grad"]) <= 2e-5


def test_the_weighted_focal_loss_is_the_references(monkeypatch: pytest.MonkeyPatch, x64) -> None:
    """By the recipe's method, with weights that are of no class counts."""
    case = golden("focal/c10_g2_weighted")
    weights = jnp.asarray(case["per_class_weights"], jnp.float64)
    monkeypatch.setattr(Reweighted, "class_weights", lambda method, context: weights)
    method = dataclasses.replace(PRESETS["focal_cb"].method, gamma=2.0)
    value, gradient = loss_and_gradient(method, case, 0)
    np.testing.assert_allclose(value, case["loss_f64"], rtol=1e-6)
    assert max_relative(gradient, case["grad"]) <= 2e-5


def test_weights_and_margins_are_the_references() -> None:
    case = golden("reweighted_ce/c10_reweight")
    weights = class_balanced_weights(case["class_counts"], 0.9999)
    np.testing.assert_allclose(weights, case["per_class_weights"], rtol=1e-5)
    assert weights.sum() == pytest.approx(10)
    case = golden("ldam/c10_s30_after")
    np.testing.assert_allclose(ldam_margins(case["class_counts"], 0.5), case["margins"], rtol=1e-6)
    np.testing.assert_allclose(class_balanced_weights(COUNTS, 0.0), np.ones(5))


def random_batch() -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(3)
    return jnp.asarray(2 * random.normal(size=(2, 9, 5))), jnp.asarray(random.integers(0, 5, 9))


@pytest.mark.slow
@pytest.mark.integration
def test_without_weights_and_exponent_all_are_cross_entropy(x64) -> None:
    logits, labels = random_batch()
    expected = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.broadcast_to(labels, (2, 9))
    ).mean(axis=1)
    for method in (
        Reweighted(),
        Reweighted("focal", gamma=0.0),
        Reweighted("ldam", max_margin=0.0),
        Reweighted(beta=0.0, **CLASS_BALANCED),
        Reweighted(reweight_epoch=7, **CLASS_BALANCED),
        Reweighted(reweight_epoch=None, **CLASS_BALANCED),
    ):
        actual = method.weighted_means(logits, whole(labels), Context(COUNTS).at(jnp.asarray(6)))
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
    switched = Reweighted(reweight_epoch=7, **CLASS_BALANCED)
    after = switched.weighted_means(logits, whole(labels), Context(COUNTS).at(jnp.asarray(7)))
    assert not np.allclose(after, expected, rtol=1e-2)


@pytest.mark.integration
def test_the_focal_factor_is_of_the_networks_probability(x64) -> None:
    """With whatever weight; and its gradient is finite where the probability is 1."""
    logits, labels = random_batch()
    p = np.take_along_axis(np.asarray(jax.nn.softmax(logits[0])), np.asarray(labels)[:, None], 1)
    weights = class_balanced_weights(COUNTS, 0.9999)[labels]
    expected = (weights * (1 - p[:, 0]) ** 2 * -np.log(p[:, 0])).sum() / weights.sum()
    method = Reweighted("focal", gamma=2.0, **CLASS_BALANCED)
    actual = method.weighted_means(logits[:1], whole(labels), Context(COUNTS))
    np.testing.assert_allclose(actual, [expected], rtol=1e-10)
    assert np.isfinite(jax.grad(focal_loss)(0.0, 0.5))


def test_a_weighted_mean_divides_by_the_weights_or_by_the_rows(x64) -> None:
    logits, labels = random_batch()
    weights = class_balanced_weights(COUNTS, 0.9999)[labels]
    means = [
        Reweighted(weight_norm=norm, **CLASS_BALANCED).weighted_means(
            logits, whole(labels), Context(COUNTS)
        )
        for norm in ("sum_w", "batch")
    ]
    np.testing.assert_allclose(means[0] * weights.mean(), means[1], rtol=1e-12)


@pytest.mark.integration
@pytest.mark.parametrize("focal_p", FOCAL_PROBABILITIES)
def test_the_class_balanced_focal_loss_divides_by_the_rows(focal_p: str, x64) -> None:
    """A row at a time, with labels as they come; by the weights it would be four times as much."""
    counts = exponential_counts(100, 500, 100)
    random = np.random.default_rng(143)
    logits = 4 * random.normal(size=(128, 100))
    labels = random.choice(100, 128, p=counts / counts.sum())
    weights = class_balanced_weights(counts, 0.9999)
    expected = 0.0
    for z, label in zip(logits, labels, strict=True):
        loss = math.log(sum(math.exp(x - z[label]) for x in z))
        if focal_p == "weighted":
            loss *= weights[label]
            expected += (1 - math.exp(-loss)) * loss / 128
        else:
            expected += weights[label] * (1 - math.exp(-loss)) * loss / 128
    method = PRESETS["focal_cb"].method
    assert isinstance(method, Reweighted) and method.focal_p == "weighted"
    method = dataclasses.replace(method, focal_p=focal_p)
    by_rows, by_weights = (
        dataclasses.replace(method, weight_norm=norm).weighted_means(
            jnp.asarray(logits)[None], whole(labels), Context(counts)
        )
        for norm in (method.weight_norm, "sum_w")
    )
    np.testing.assert_allclose(by_rows, [expected], rtol=1e-10)
    assert by_rows[0] == pytest.approx(2.15 if focal_p == "weighted" else 2.41, abs=0.005)
    assert by_weights[0] / by_rows[0] == pytest.approx(1 / weights[labels].mean(), rel=1e-9)
    assert by_weights[0] > 8


@pytest.mark.integration
def test_rows_of_two_labels_count_by_their_shares(x64) -> None:
    logits, labels = random_batch()
    others = jnp.roll(labels, 1)
    share = jnp.linspace(0.1, 0.9, 9)
    batch = TrainBatch((), labels, others, share)
    method = Reweighted("ldam", **CLASS_BALANCED)
    context = Context(COUNTS, scale=30.0)
    weights = class_balanced_weights(COUNTS, 0.9999)
    total, norm = 0.0, 0.0
    for i in range(9):
        for label, part in ((labels[i], share[i]), (others[i], 1 - share[i])):
            lowered = np.array(logits[0, i])
            lowered[label] -= 30 * ldam_margins(COUNTS, 0.5)[label]
            loss = np.log(np.exp(lowered - lowered.max()).sum()) + lowered.max() - lowered[label]
            total += part * weights[label] * loss
            norm += part * weights[label]
    actual = method.weighted_means(logits[:1], batch, context)
    np.testing.assert_allclose(actual, [total / norm], rtol=1e-10)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("base", "hinge", "config.method.base must be one of cross_entropy, .* got 'hinge'"),
        ("beta", 1.0, "config.method.beta must be from 0 to 0.999999999, got 1"),
        ("gamma", -1.0, "config.method.gamma must be from 0 to 100, got -1"),
    ],
)
def test_values_that_are_not_valid_are_refused(field: str, value, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Reweighted(**{field: value})


def test_a_class_without_examples_is_refused() -> None:
    logits, labels = random_batch()
    with pytest.raises(UserError, match="Every class needs at least one training example"):
        Reweighted("ldam").weighted_means(logits, whole(labels), Context(np.array([5, 0, 1, 1, 1])))


def test_remix_begins_to_weigh_with_the_last_drop_of_its_rate() -> None:
    config = get_config("cifar100_lt", "method=remix_drw")
    assert config.mix.rule == "remix" and config.method.weight_norm == "batch"
    assert config.method.reweight_epoch == config.optim.decay_epochs[-1] == 250
    photos = get_config("inaturalist2018", "method=remix_drw")
    assert photos.method.reweight_epoch == photos.optim.decay_epochs[-1] == 150
    # With a beta so near to 1, weights are nearly in inverse proportion to the counts.
    weights = class_balanced_weights(np.array([1000, 10, 2]), photos.method.beta)
    np.testing.assert_allclose(weights[1:] / weights[0], [100, 500], rtol=2e-3)
