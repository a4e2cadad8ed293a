# SPDX-License-Identifier: Apache-2.0
"""DirMixE: its loss is a slow twin's and the authors', its draws belong to seed and step alone."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.methods import PRESETS, Context
from balpoe_jax.methods.dirmixe import (
    DirMixE,
    adjustments,
    draw_losses,
    draw_targets,
    expert_targets,
    semi_variance,
)
from tests.helpers.config_files import get_config
from tests.helpers.golden import golden, max_relative
from tests.helpers.method_steps import fresh, run
from tests.helpers.mixed_rows import COUNTS, log_probability, mixed_batch

# What `Method.loss` is handed in place of images and a network: the logits themselves.
LOGITS_AS_IMAGES = lambda images: (SimpleNamespace(logits=images), {})  # noqa: E731


def drawn(method: DirMixE, state: dict, step: int, counts: np.ndarray):
    """What a step draws, as numbers."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), step)
    found = draw_targets(key, expert_targets(counts), method.samples, method.concentration)
    return tuple(np.asarray(x) for x in found)


@pytest.mark.integration
@pytest.mark.parametrize("epoch", [1, 2])
def test_the_loss_is_its_twin(epoch: int, x64) -> None:
    """Row by row, draw by draw, with mixed labels; the semi-variance from the second epoch on."""
    logits, rows = mixed_batch()
    logits = np.concatenate([logits, logits[:1] + 1])
    method = DirMixE(
        concentration=20.0, samples=7, power=1.3, variance_weight=3.0, variance_epoch=2
    )
    context = Context(COUNTS, steps_per_epoch=5).at(5 * epoch)
    state = method.init_state(None, context, jax.random.key(4))
    batch = rows._replace(views=(jnp.asarray(logits),))
    found = method.loss(LOGITS_AS_IMAGES, state, batch, context)

    experts, log_targets = drawn(method, state, 5 * epoch, COUNTS)
    prior, losses = COUNTS / COUNTS.sum(), []
    for e, target in zip(experts, np.exp(np.float64(log_targets)), strict=True):
        bias = [-np.log((target[c] / prior[c]) ** 1.3 + 1e-9) for c in range(3)]
        of_rows = []
        for i in range(4):
            first, second = (
                log_probability(logits[e, i] + bias, label[i])
                for label in (rows.labels, rows.other_labels)
            )
            of_rows.append(-rows.mix_weight[i] * first - (1 - rows.mix_weight[i]) * second)
        losses.append(sum(of_rows) / 4)
    mean = sum(losses) / 7
    above = [loss - mean for loss in losses if loss > mean]
    variance = sum(x * x for x in above) / max(len(above) - 1, 1)
    total = mean + (3 * variance if epoch >= 2 else 0)
    np.testing.assert_allclose(found.total, total, rtol=1e-6)
    np.testing.assert_allclose(found.terms["semi_variance"], variance, rtol=1e-6)
    for e in range(3):
        own = [loss for loss, expert in zip(losses, experts, strict=True) if expert == e]
        np.testing.assert_allclose(found.by_expert[e], np.mean(own) if own else 0, rtol=1e-6)


@pytest.mark.integration
@pytest.mark.slow_cases("early-c10", "late-c100")
@pytest.mark.parametrize("name", ["c10", "c100"])
@pytest.mark.parametrize("when", ["early", "late"])
def test_the_loss_of_given_draws_is_the_authors(name: str, when: str, x64) -> None:
    case = golden(f"dirmixe/{name}")
    counts = case["class_counts"]
    if len(set(counts)) == len(counts):  # of equal sizes the authors' sort leaves the order open
        np.testing.assert_allclose(expert_targets(counts), case["means"], rtol=1e-6)
    log_targets = jnp.log(jnp.asarray(case["targets"], jnp.float64))
    biases = adjustments(log_targets, counts, float(case["power"]))
    weight = float(case["variance_weight"]) if when == "late" else 0.0

    def loss(logits: jax.Array) -> jax.Array:
        losses = draw_losses(logits, case["labels"], case["experts"], biases).mean(axis=1)
        return losses.mean() + weight * semi_variance(losses)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(case["expert_logits"], jnp.float64))
    np.testing.assert_allclose(value, case[f"loss_{when}_f64"], rtol=1e-6)
    assert max_relative(gradient, case[f"grad_{when}"]) <= 1e-6


def test_equal_losses_have_no_semi_variance_and_a_gradient() -> None:
    value, gradient = jax.value_and_grad(semi_variance)(jnp.full(4, 2.0))
    assert value == 0 and not gradient.any()
    # 1 and 3 lie above the mean of 0, by those; one less than two divides.
    np.testing.assert_allclose(semi_variance(jnp.array([-4.0, 1.0, 3.0, 0.0])), 10.0)


@pytest.mark.integration
def test_draws_are_of_the_dirichlets() -> None:
    """Experts as often as each other; means and variances are the distributions' own."""
    means = expert_targets(np.array([60, 30, 10]))
    np.testing.assert_allclose(means, [[0.6, 0.3, 0.1], [1 / 3] * 3, [0.1, 0.3, 0.6]])
    experts, log_targets = draw_targets(jax.random.key(0), means, 6000, 50.0)
    targets = np.exp(np.asarray(log_targets))
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    for e in range(3):
        own = targets[experts == e]
        assert 1850 < len(own) < 2150
        np.testing.assert_allclose(own.mean(axis=0), means[e], atol=0.006)
        np.testing.assert_allclose(own.var(axis=0), means[e] * (1 - means[e]) / 51, rtol=0.12)


@pytest.mark.integration
def test_tiny_parameters_give_finite_adjustments() -> None:
    counts = np.array([100_000, 1000, 2])
    means = expert_targets(counts)
    _, log_targets = draw_targets(jax.random.key(1), means, 200, 0.5)
    assert np.isfinite(log_targets).all() and np.exp(log_targets).min() == 0
    biases = adjustments(log_targets, counts, 1.3)
    assert np.isfinite(biases).all() and biases.max() <= -np.log(1e-9) + 1e-3


def test_draws_belong_to_seed_and_step_alone() -> None:
    method, context = DirMixE(samples=5), Context(COUNTS)
    states = [method.init_state(None, context, jax.random.key(seed)) for seed in (1, 1, 2)]
    one, same, other = (drawn(method, state, 3, COUNTS)[1] for state in states)
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert not np.allclose(one, drawn(method, states[0], 4, COUNTS)[1])


@pytest.mark.integration
def test_the_key_is_in_every_checkpoint_and_stays(x64) -> None:
    key = fresh("dirmixe").method_state["key"]
    assert key.dtype == np.uint32
    for state, metrics in run("dirmixe", "pmap", 1, 0, np.float64):
        np.testing.assert_array_equal(state.method_state["key"], key)
        assert metrics["loss_semi_variance"] > 0


def test_the_semi_variance_counts_in_the_last_fifth_of_every_training() -> None:
    for data, epoch in {"cifar100_lt": 160, "imagenet_lt": 144, "inaturalist2018": 80}.items():
        assert get_config(data, "method=dirmixe").method.variance_epoch == epoch
    assert get_config("cifar100_lt", "method=dirmixe,recipe=long").method.variance_epoch == 320


def test_the_authors_settings() -> None:
    expected = {
        "cifar10_lt": (1e4, 1.3, 15.0, 5e-4, 0.1),
        "cifar100_lt": (1e4, 1.3, 5.0, 1e-3, 0.1),
        "imagenet_lt": (1e4, 1.6, 1.0, 7e-4, 0.025),
        "inaturalist2018": (1e5, 1.3, 1.0, 2e-4, 0.2),
    }
    for data, values in expected.items():
        config = get_config(data, "method=dirmixe")
        method = config.method
        found = (method.concentration, method.power, method.variance_weight)
        assert (*found, config.optim.weight_decay, config.eval.expert_weights_rate) == values
        assert config.model.num_experts == 3 and config.model.reduce_dimension


def test_another_number_of_experts_is_refused() -> None:
    labels = np.zeros(2, np.int64)
    batch = TrainBatch((jnp.zeros((2, 2, 3)),), labels, labels, np.ones(2))
    method = PRESETS["dirmixe"].method
    state = method.init_state(None, Context(COUNTS), jax.random.key(0))
    with pytest.raises(UserError, match="DirMixE has 3 experts, got 2; leave experts alone"):
        method.loss(LOGITS_AS_IMAGES, state, batch, Context(COUNTS))
    with pytest.raises(UserError, match="empty"):
        adjustments(jnp.zeros((1, 2)), np.array([3, 0]), 1.0)
