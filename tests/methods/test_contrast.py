# SPDX-License-Identifier: Apache-2.0
"""PaCo and BCL against slow twins in loops, and what their definitions promise."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.config import default_config, resolve
from balpoe_jax.data.long_tail import exponential_counts
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.settings import check
from balpoe_jax.losses import log_prior, logit_adjusted_cross_entropy
from balpoe_jax.methods import Context, Network, make_method
from balpoe_jax.methods.bcl import BCL, balanced_contrastive_loss
from balpoe_jax.methods.contrastive import ProjectedOutputs
from balpoe_jax.methods.paco import PaCo, paco_loss
from balpoe_jax.parallel import make_parallel
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config
from tests.helpers.method_steps import fresh, parts, run
from tests.helpers.tiny_network import COUNTS, numeric_gradient

RANDOM = np.random.default_rng(5)
PRIOR = np.log(COUNTS / COUNTS.sum() + 1e-9)
LABELS = np.array([0, 1, 0, 2, 1, 0])


def unit(*shape: int) -> np.ndarray:
    rows = RANDOM.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class Linear:
    """In the place of a module: images `[B, C + P]` are logits and, times a factor, projections."""

    @staticmethod
    def apply(variables, images, train: bool, mutable: list[str]):
        logits, projections = images[None, :, :5], images[:, 5:] * variables["params"]
        outputs = ProjectedOutputs(logits, logits, projections, jnp.asarray(PROTOTYPES))
        return outputs, {"batch_stats": images.mean()}


PROTOTYPES = unit(5, 4)


def view() -> np.ndarray:
    """Logits and projections of six images, which `Linear` takes for images."""
    return np.hstack([RANDOM.normal(size=(6, 5)), unit(6, 4)])


TWO_VIEWS = TrainBatch((view(), view()), LABELS, None, None)


# --- PaCo --------------------------------------------------------------------------------------


def paco_twin(logits, similarities, labels, others, alpha, beta=1.0, gamma=1.0) -> float:
    """The mean loss, by the formula, an image and a term at a time."""
    total = 0.0
    for i, label in enumerate(labels):
        s = logits[i] + PRIOR
        mine = [a for a in range(len(others)) if a != i]
        log_d = math.log(
            sum(math.exp(x) for x in s) + gamma * sum(math.exp(similarities[i, a]) for a in mine)
        )
        value, weight = beta * (s[label] - log_d), beta
        for a in mine:
            if others[a] == label:
                value += alpha * (similarities[i, a] - log_d)
                weight += alpha
        total -= value / weight
    return total / len(labels)


@pytest.mark.parametrize(("alpha", "beta", "gamma"), [(0.05, 1.0, 1.0), (2.0, 0.5, 3.0)])
def test_paco_is_its_twin(alpha: float, beta: float, gamma: float, x64) -> None:
    logits = RANDOM.normal(size=(6, 5), scale=2)
    similarities = RANDOM.normal(size=(6, 14), scale=4)
    others = np.concatenate([LABELS, LABELS, [-1, 2]])

    def twin(logits, similarities):
        return paco_twin(logits, similarities, LABELS, others, alpha, beta, gamma)

    def loss(logits, similarities):
        return paco_loss(
            logits, similarities, jnp.asarray(LABELS), jnp.asarray(others), jnp.asarray(PRIOR),
            alpha, beta, gamma,
        ).mean()  # fmt: skip

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(logits, similarities)
    np.testing.assert_allclose(value, twin(logits, similarities), rtol=1e-9)
    expected = numeric_gradient(lambda x: twin(x, similarities), logits)
    np.testing.assert_allclose(gradients[0], expected, atol=1e-8)
    expected = numeric_gradient(lambda x: twin(logits, x), similarities)
    np.testing.assert_allclose(gradients[1], expected, atol=1e-8)
    assert not np.diag(gradients[1][:, :6]).any()  # no image is its own contrast


@pytest.mark.integration
def test_the_whole_loss_of_paco_contrasts_with_keys_and_queue(x64) -> None:
    """The keys are the slow network's, which is twice the fast one here."""
    method = PaCo(alpha=0.3, temperature=0.5, width=4, queue_size=8)
    queue, queue_labels = unit(8, 4), np.array([0, 1, 2, -1, -1, 4, 0, 3])
    method_state = {"params": 2.0, "batch_stats": 0.0, "queue": queue, "labels": queue_labels}
    found = method.loss(
        Network(Linear(), 1.0, 0.0),
        jax.tree.map(jnp.asarray, method_state),
        jax.tree.map(jnp.asarray, TWO_VIEWS),
        Context(COUNTS),
    )
    first, second = TWO_VIEWS.images, TWO_VIEWS.views[1]
    keys = 2 * second[:, 5:]
    contrasts = np.concatenate([first[:, 5:], keys, queue])
    others = np.concatenate([LABELS, LABELS, queue_labels])
    similarities = first[:, 5:] @ contrasts.T / 0.5
    expected = paco_twin(first[:, :5], similarities, LABELS, others, 0.3)
    np.testing.assert_allclose(found.total, expected, rtol=1e-6)
    np.testing.assert_allclose(found.method_state["queue"], np.concatenate([keys, queue[:2]]))
    np.testing.assert_array_equal(found.method_state["labels"], [*LABELS, *queue_labels[:2]])
    assert found.batch_stats == pytest.approx(first.mean())
    assert found.method_state["batch_stats"] == pytest.approx(second.mean())


@pytest.mark.integration
def test_the_whole_loss_of_gpaco_contrasts_both_views(x64) -> None:
    method = PaCo(alpha=0.3, temperature=0.5, width=4, momentum=0.0)
    batch = jax.tree.map(jnp.asarray, TWO_VIEWS)
    found = method.loss(Network(Linear(), 1.0, 0.0), {}, batch, Context(COUNTS))
    both = np.concatenate([TWO_VIEWS.images, TWO_VIEWS.views[1]])
    labels, similarities = np.tile(LABELS, 2), both[:, 5:] @ both[:, 5:].T / 0.5
    expected = paco_twin(both[:, :5], similarities, labels, labels, 0.3)
    np.testing.assert_allclose(found.total, expected, rtol=1e-6)


@pytest.mark.parametrize("by_view", [True, False])
def test_gpaco_contrasts_its_own_queue_too(by_view: bool, x64) -> None:
    """Both views are contrasted with both and the queue, which second views enter."""
    method = PaCo(
        alpha=0.3, temperature=0.5, width=4, queue_size=8, momentum=0.0,
        queue_without_momentum=True, passes_by_view=by_view,
    )  # fmt: skip
    queue, queue_labels = unit(8, 4), np.array([0, 1, 2, -1, -1, 4, 0, 3])
    found = method.loss(
        Network(Linear(), 1.0, 0.0),
        {"queue": jnp.asarray(queue), "labels": jnp.asarray(queue_labels)},
        jax.tree.map(jnp.asarray, TWO_VIEWS),
        Context(COUNTS),
    )
    both = np.concatenate([TWO_VIEWS.images, TWO_VIEWS.views[1]])
    others = np.concatenate([LABELS, LABELS, queue_labels])
    similarities = both[:, 5:] @ np.concatenate([both[:, 5:], queue]).T / 0.5
    labels = np.tile(LABELS, 2)
    expected = paco_twin(both[:, :5], similarities, labels, others, 0.3)
    np.testing.assert_allclose(found.total, expected, rtol=1e-6)
    without = paco_twin(both[:, :5], similarities[:, :12], labels, labels, 0.3)
    assert abs(found.total - without) > 0.1
    keys = TWO_VIEWS.views[1][:, 5:]
    assert found.method_state.keys() == {"queue", "labels"}
    np.testing.assert_allclose(found.method_state["queue"], np.concatenate([keys, queue[:2]]))
    np.testing.assert_array_equal(found.method_state["labels"], [*LABELS, *queue_labels[:2]])


@pytest.mark.integration
def test_gpaco_has_ten_times_the_positives_with_its_queue() -> None:
    """At the recipe's size on ImageNet-LT, of labels as often as a long tail has them.

    All projections are equal, of similarity 1, so that the loss tells the number of positives.
    """
    method = make_method(get_config("imagenet_lt", "method=gpaco").method.to_dict())
    method = dataclasses.replace(method, width=2)
    assert (method.queue_size, method.temperature, method.alpha) == (8192, 0.2, 0.045)
    counts, batch = exponential_counts(1000, 1280, 256), 128
    labels = np.random.default_rng(0).choice(1000, (65, batch), p=counts / counts.sum())
    images = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (batch, 2))

    class Constant:
        @staticmethod
        def apply(variables, images, train: bool, mutable: list[str]):
            logits = jnp.zeros((1, len(images), 1000))
            return ProjectedOutputs(logits, logits, images, images[:0]), {"batch_stats": 0.0}

    net = Network(Constant(), 0.0, 0.0)
    last = TrainBatch((images, images), jnp.asarray(labels[64]), None, None)
    state = method.init_state(net, Context(counts), jax.random.key(0))
    full = {
        "queue": jnp.broadcast_to(jnp.asarray([1.0, 0.0]), state["queue"].shape),
        "labels": jnp.asarray(labels[:64].ravel()).astype(state["labels"].dtype),
    }
    total = method.loss(net, full, last, Context(counts)).total
    own = np.array([2 * np.sum(labels[64] == y) - 1 for y in labels[64]])
    queued = np.array([np.sum(labels[:64] == y) for y in labels[64]])
    sharp = np.exp(1 / method.temperature)
    prior = np.log(counts / counts.sum() + 1e-9)[labels[64]]

    def expected(positives: np.ndarray, others: int) -> float:
        log_d = np.log(1 + others * sharp)
        images = method.alpha * positives * (1 / method.temperature - log_d)
        return float(-np.mean((prior - log_d + images) / (1 + method.alpha * positives)))

    np.testing.assert_allclose(total, expected(own + queued, 2 * batch - 1 + 8192), rtol=1e-4)
    assert own.mean() < 2 and (own + queued).mean() > 10 * own.mean()
    plain = dataclasses.replace(method, queue_without_momentum=False)
    assert plain.init_state(net, Context(counts), jax.random.key(0)) == {}
    found = plain.loss(net, {}, last, Context(counts))
    np.testing.assert_allclose(found.total, expected(own, 2 * batch - 1), rtol=1e-4)


@pytest.mark.integration
def test_gpaco_normalises_each_view_by_itself() -> None:
    """The statistics move by the first view's and then by the second's."""
    method, context, network = parts("gpaco", None)
    variables = tiny_network.init(network)
    net = Network(network, variables["params"], variables["batch_stats"])
    drawn = tiny_network.batch(8, views=2)
    batch = jax.tree.map(jnp.asarray, drawn._replace(views=(drawn.images, 3 * drawn.images + 1)))
    state = method.init_state(net, context, jax.random.key(1))

    @jax.jit
    def statistics():
        together = dataclasses.replace(method, passes_by_view=False)
        found = [each.loss(net, state, batch, context) for each in (method, together)]
        expected = net
        for view in batch.views:
            expected = dataclasses.replace(expected, batch_stats=expected(view)[1])
        return [each.batch_stats for each in found], expected.batch_stats, [x.total for x in found]

    (apart, together), expected, totals = statistics()
    chex.assert_trees_all_close(apart, expected, rtol=1e-6)
    means = [x["ensemble"]["trunk"]["BatchNorm_0"]["mean"] for x in (apart, together)]
    assert np.abs(means[0] - means[1]).max() > 0.01
    assert abs(totals[0] - totals[1]) > 1e-3


def test_without_contrast_paco_is_balanced_softmax(x64) -> None:
    logits = jnp.asarray(RANDOM.normal(size=(6, 5)))
    prior, labels = log_prior(COUNTS), jnp.asarray(LABELS)
    losses = paco_loss(logits, jnp.ones((6, 9)), labels, jnp.zeros(9, int), prior, 0, 1, 0)
    expected = logit_adjusted_cross_entropy(logits, labels, prior, 1.0)
    np.testing.assert_allclose(losses, expected, rtol=1e-7)


@pytest.mark.integration
def test_paco_bears_its_sharpest_similarities() -> None:
    """At temperature 0.05 they reach 20, of an image with itself too."""
    logits = jnp.array([[80.0, -80, 0, 0, 0]] * 2)
    similarities = jnp.array([[1e4, -20.0, 20.0], [20.0, 1e4, -20.0]])
    labels = jnp.array([0, 1])
    others = jnp.array([0, 1, 0])
    value, gradient = jax.value_and_grad(
        lambda s: paco_loss(logits, s, labels, others, jnp.asarray(PRIOR, "f4"), 0.05).sum()
    )(similarities)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.integration
@pytest.mark.slow_cases("ncl_contrast")
@pytest.mark.parametrize("name", ["paco", "ncl_contrast"])
def test_the_queue_and_the_slow_network_move_as_they_should(name: str, x64) -> None:
    """Keys of a step are those of the network after its own move, and enter at the front.

    Looked at in the second step, in which the slow network is not yet that of the first one.
    """
    method, context, network = parts(name)
    start = fresh(name).method_state
    np.testing.assert_array_equal(start.get("labels", -1), -1)
    np.testing.assert_allclose(np.linalg.norm(start["queue"], axis=-1), 1, rtol=1e-5)
    (state, _), (after, _), *_ = run(name, "pmap", 1, 0, np.float64)
    m = method.momentum
    expected = jax.tree.map(
        lambda a, b: m * a + (1 - m) * b, state.method_state["params"], state.params
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13),
        after.method_state["params"],
        expected,
    )
    size = context.batch_size
    batch = tiny_network.batch(size, seed=1, dtype=np.float64)
    slow = Network(network, expected, state.method_state["batch_stats"])
    projected = jax.vmap(lambda images: slow(images)[0].projections, axis_name=context.axis_name)(
        batch.views[1][None]
    )[0]
    keys = np.moveaxis(projected, -2, 0)  # rows first, where there are several networks
    new = {"queue": keys, "labels": batch.labels}
    for kept in sorted(new.keys() & after.method_state.keys()):
        np.testing.assert_allclose(after.method_state[kept][:size], new[kept], atol=1e-9)
        np.testing.assert_array_equal(
            after.method_state[kept][size:], state.method_state[kept][:-size]
        )


@pytest.mark.integration
def test_the_slow_network_gets_no_gradient_and_the_queue_none() -> None:
    """Only what went through the fast network and the classifier is learnt from."""
    method, _, network = parts("paco", None)
    context = dataclasses.replace(parts("paco", None)[1])
    variables = tiny_network.init(network)
    net = Network(network, variables["params"], variables["batch_stats"])
    method_state = method.init_state(net, context, jax.random.key(1))
    batch = jax.tree.map(jnp.asarray, tiny_network.batch(8, views=method.views))

    def loss(params, slow):
        network = dataclasses.replace(net, params=params)
        return method.loss(network, {**method_state, **slow}, batch, context).total

    slow = {"params": method_state["params"], "queue": method_state["queue"]}
    fast, of_slow = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], slow)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(fast) if leaf.ndim > 1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_slow["params"]))


# --- BCL ---------------------------------------------------------------------------------------


def bcl_twin(features, labels, prototypes, temperature) -> float:
    total = 0.0
    for i, label in enumerate(labels):
        normaliser = 0.0
        for c, prototype in enumerate(prototypes):
            members = [features[j] for j in range(len(labels)) if labels[j] == c and j != i]
            members.append(prototype)
            exponentials = [math.exp(features[i] @ a / temperature) for a in members]
            normaliser += sum(exponentials) / len(members)
        positives = [features[j] for j in range(len(labels)) if labels[j] == label and j != i]
        positives.append(prototypes[label])
        for a in positives:
            total -= (features[i] @ a / temperature - math.log(normaliser)) / len(positives)
    return total / len(labels)


def test_bcl_is_its_twin(x64) -> None:
    features, prototypes, temperature = unit(6, 4), unit(5, 4), 0.3

    def loss(features, prototypes):
        return balanced_contrastive_loss(
            features, jnp.asarray(LABELS), prototypes, temperature
        ).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(features, prototypes)
    np.testing.assert_allclose(
        value, bcl_twin(features, LABELS, prototypes, temperature), rtol=1e-9
    )
    expected = numeric_gradient(lambda x: bcl_twin(x, LABELS, prototypes, temperature), features)
    np.testing.assert_allclose(gradients[0], expected, atol=1e-7)
    expected = numeric_gradient(lambda x: bcl_twin(features, LABELS, x, temperature), prototypes)
    np.testing.assert_allclose(gradients[1], expected, atol=1e-7)


@pytest.mark.integration
def test_the_whole_loss_of_bcl_classifies_one_view_and_contrasts_two(x64) -> None:
    method = BCL(classification=1.5, contrast=0.4, temperature=0.5)
    batch = TWO_VIEWS._replace(views=(*TWO_VIEWS.views, view()))
    placed = jax.tree.map(jnp.asarray, batch)
    found = method.loss(Network(Linear(), 1.0, 0.0), {}, placed, Context(COUNTS))
    features = np.concatenate([batch.views[1][:, 5:], batch.views[2][:, 5:]])
    contrasted = bcl_twin(features, np.tile(LABELS, 2), PROTOTYPES, 0.5)
    rows = zip(batch.images[:, :5] + PRIOR, LABELS, strict=True)
    classified = np.mean([math.log(sum(np.exp(z))) - z[y] for z, y in rows])
    np.testing.assert_allclose(found.total, 1.5 * classified + 0.4 * contrasted, rtol=1e-6)
    np.testing.assert_allclose(found.by_expert, [classified], rtol=1e-6)


@pytest.mark.integration
def test_copies_of_another_class_with_its_prototype_change_nothing(x64) -> None:
    """A class counts once, however many members it has."""
    features, prototypes = unit(4, 4), unit(3, 4)
    labels = np.array([0, 0, 1, 2])
    features[2] = prototypes[1]
    first = balanced_contrastive_loss(features, labels, prototypes, 0.2)[:2]
    more = np.concatenate([features, features[[2, 2, 2]]])
    labels = np.concatenate([labels, [1, 1, 1]])
    again = balanced_contrastive_loss(more, labels, prototypes, 0.2)[:2]
    np.testing.assert_allclose(again, first, rtol=1e-9)


@pytest.mark.integration
def test_an_absent_class_enters_by_its_prototype_alone(x64) -> None:
    features, prototypes = unit(3, 4), unit(2, 4)
    labels = np.zeros(3, int)
    losses = balanced_contrastive_loss(features, labels, prototypes, 0.5)
    for i in range(3):
        own = [features[j] for j in range(3) if j != i] + [prototypes[0]]
        terms = [math.exp(features[i] @ a / 0.5) for a in own]
        total = math.log(sum(terms) / 3 + math.exp(features[i] @ prototypes[1] / 0.5))
        expected = total - np.mean([features[i] @ a / 0.5 for a in own])
        np.testing.assert_allclose(losses[i], expected, rtol=1e-9)


@pytest.mark.integration
def test_prototypes_learn_through_head_and_classifier() -> None:
    _, _, network = parts("bcl", None)
    variables = tiny_network.init(network)
    images = tiny_network.batch(6).images

    @jax.jit
    @jax.grad
    def gradient(params):
        outputs, _ = Network(network, params, variables["batch_stats"])(images)
        assert outputs.prototypes.shape == (len(COUNTS), BCL().width)
        return (outputs.prototypes**3).sum()

    found = gradient(variables["params"])
    assert np.abs(jax.tree.leaves(found["prototype"])[-1]).max() > 0
    assert all(
        np.abs(leaf).max() > 0
        for leaf in jax.tree.leaves(found["ensemble"]["expert"]["head"])
        if leaf.ndim > 2
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found["ensemble"]["trunk"]))


# --- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PaCo(), BCL()])
def test_one_expert_it_is(method) -> None:
    with pytest.raises(UserError, match="trains one expert, got 3; leave experts alone"):
        method.network(tiny_network.experts(3), Context(COUNTS))


def test_mixed_images_are_refused() -> None:
    config = get_config("digits_lt", "method=paco,mixup=true")
    with pytest.raises(UserError, match=r"paco knows no mixed labels: config.mix.alpha must be 0"):
        check(resolve(config), make_parallel())
    config = get_config("digits_lt", "method=balpoe")
    config.view2 = default_config().augment
    with pytest.raises(UserError, match="takes 1 views of an image, and the config describes 2"):
        check(resolve(config), make_parallel())
    config = get_config("digits_lt", "method=bcl")
    config.optim.accumulation_steps = 2
    with pytest.raises(UserError, match="accumulation_steps must be 1 for the method bcl"):
        check(resolve(config), make_parallel())
