# SPDX-License-Identifier: Apache-2.0
"""NCL against a slow twin in loops, and its limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import log_prior, logit_adjusted_cross_entropy
from balpoe_jax.methods import Context, Network
from balpoe_jax.methods.contrastive import ProjectedExpertsOutputs
from balpoe_jax.methods.ncl import (
    NCL,
    contrastive_losses,
    hard_classes,
    mutual_divergences,
    nested_losses,
)
from tests.helpers.method_steps import fresh, parts
from tests.helpers.tiny_network import COUNTS, logits_as_images, numeric_gradient

RANDOM = np.random.default_rng(11)
LOG_COUNTS = np.log(COUNTS)
LABELS = np.array([0, 4, 2, 1])


def softmax(z: list[float]) -> list[float]:
    largest = max(z)
    exponentials = [math.exp(x - largest) for x in z]
    return [x / sum(exponentials) for x in exponentials]


def twin(logits, number: int, distillation: float, hard_from=None) -> float:
    """The mean over images of the sum over networks, a term at a time."""
    experts, batch, classes = logits.shape
    total, chooser = 0.0, logits[0] if hard_from is None else hard_from
    for i, label in enumerate(LABELS):
        order = sorted(range(classes), key=lambda c: (c != label, -chooser[i, c]))
        hard = set(order[:number])
        for e in range(experts):
            for masked in (False, True):

                def row(k: int, masked=masked, hard=hard, i=i) -> list[float]:
                    z = list(logits[k, i] + LOG_COUNTS)
                    if masked:
                        z = [x if c in hard else 0.0 for c, x in enumerate(z)]
                    return softmax(z)

                own = row(e)
                total -= math.log(own[label])
                for k in range(experts):
                    if k != e:
                        pairs = zip(row(k), own, strict=True)
                        kl = sum(a * (math.log(a + 1e-9) - math.log(b + 1e-9)) for a, b in pairs)
                        total += distillation / (experts - 1) * kl
    return total / batch


def test_ncl_is_its_twin(x64) -> None:
    logits = RANDOM.normal(size=(3, 4, 5), scale=2)

    def loss(logits):
        own, others = nested_losses(logits, jnp.asarray(LABELS), jnp.asarray(LOG_COUNTS), 2)
        return (own.sum(axis=0) + 0.6 / 2 * others.sum(axis=0)).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
    np.testing.assert_allclose(value, twin(logits, 2, 0.6), rtol=1e-9)
    expected = numeric_gradient(lambda z: twin(z, 2, 0.6, logits[0]), logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    assert np.isfinite(gradient).all()


@pytest.mark.integration
def test_the_whole_loss_is_the_twin_with_its_weights(x64) -> None:
    logits = RANDOM.normal(size=(3, 4, 5), scale=2)
    images = jnp.asarray(np.moveaxis(logits, 0, 1))
    batch = TrainBatch((images,), jnp.asarray(LABELS), None, None)
    method = NCL(distillation=0.7, hard_share=0.5)  # two of five classes
    found = method.loss(logits_as_images, {}, batch, Context(COUNTS))
    np.testing.assert_allclose(found.total, twin(logits, 2, 0.7), rtol=1e-6)
    parts = found.by_expert.sum() + found.terms["distillation"]
    np.testing.assert_allclose(found.total, parts, rtol=1e-9)


def test_each_network_has_its_divergences_from_the_others(x64) -> None:
    logits = RANDOM.normal(size=(3, 2, 5))
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    found = mutual_divergences(jnp.asarray(logits))
    for e in range(3):
        expected = sum((p[k] * np.log(p[k] / p[e])).sum(axis=-1) for k in range(3) if k != e)
        np.testing.assert_allclose(found[e], expected, rtol=1e-6)


def test_the_label_is_always_among_the_hard_classes() -> None:
    logits = jnp.array([[5.0, 4, 3, 2, 1], [5.0, 4, 3, 2, 1]])
    found = hard_classes(logits, jnp.array([4, 0]), 2)
    np.testing.assert_array_equal(found, [[1, 0, 0, 0, 1], [1, 1, 0, 0, 0]])


@pytest.mark.integration
def test_one_network_has_nobody_to_learn_from(x64) -> None:
    """And with all classes hard it learns balanced softmax twice."""
    logits = jnp.asarray(RANDOM.normal(size=(1, 4, 5)))
    labels = jnp.asarray(LABELS)
    own, others = nested_losses(logits, labels, jnp.asarray(LOG_COUNTS), 5)
    assert not np.any(others)
    expected = logit_adjusted_cross_entropy(logits[0], labels, log_prior(COUNTS), 1.0)
    np.testing.assert_allclose(own[0], 2 * expected, rtol=1e-6)


def test_networks_that_agree_are_not_distilled(x64) -> None:
    logits = jnp.tile(jnp.asarray(RANDOM.normal(size=(1, 4, 5))), (3, 1, 1))
    _, others = nested_losses(logits, jnp.asarray(LABELS), jnp.asarray(LOG_COUNTS), 2)
    np.testing.assert_allclose(others, 0, atol=1e-12)


@pytest.mark.integration
def test_a_mask_of_zeros_tells_counts_from_shares(x64) -> None:
    """Which the paper's mask, of minus infinity, would not."""
    logits, labels = jnp.asarray(RANDOM.normal(size=(2, 4, 5))), jnp.asarray(LABELS)
    counts, shares = (
        nested_losses(logits, labels, jnp.asarray(LOG_COUNTS - shift), 2)[0]
        for shift in (0.0, math.log(COUNTS.sum()))
    )
    assert np.abs(counts - shares).max() > 0.1


def contrast_twin(queries, keys, queue, temperature: float) -> float:
    """The mean over images of the sum over networks, a similarity at a time."""
    total = 0.0
    for own, key, others in zip(queries, keys, queue.swapaxes(0, 1), strict=True):
        for q, k in zip(own, key, strict=True):
            similarities = [sum(a * b for a, b in zip(q, x, strict=True)) for x in (k, *others)]
            total -= math.log(softmax([x / temperature for x in similarities])[0])
    return total / queries.shape[1]


def test_contrast_is_its_twin(x64) -> None:
    queries, keys = RANDOM.normal(size=(2, 3, 4, 6))
    queue = RANDOM.normal(size=(5, 3, 6))

    def loss(queries):
        return contrastive_losses(queries, keys, queue, 0.5).mean(axis=1).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(queries)
    np.testing.assert_allclose(value, contrast_twin(queries, keys, queue, 0.5), rtol=1e-9)
    expected = numeric_gradient(lambda q: contrast_twin(q, keys, queue, 0.5), queries)
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


class Scaled:
    """Of images `[B, 3, 5 + 6]` logits and projections, which a network scales by its parameter."""

    def apply(self, variables, images, train: bool, mutable: list[str]):
        scaled = variables["params"] * jnp.moveaxis(images, 1, 0)
        outputs = ProjectedExpertsOutputs(scaled[..., :5], scaled, scaled[..., 5:])
        return outputs, {"batch_stats": images.mean()}


@pytest.mark.integration
def test_the_whole_loss_with_contrast(x64) -> None:
    """The keys are those of the slow network, which is twice the fast one here."""
    method = NCL(distillation=0.7, hard_share=0.5, contrast=0.4, temperature=0.5, queue_size=5)
    first, second = RANDOM.normal(size=(2, 4, 3, 11))
    queue = RANDOM.normal(size=(5, 3, 6))
    rows = TrainBatch((first, second), LABELS, None, None)
    method_state = {"params": 2.0, "batch_stats": 0.0, "queue": queue}
    found = method.loss(
        Network(Scaled(), 1.0, 0.0),
        jax.tree.map(jnp.asarray, method_state),
        jax.tree.map(jnp.asarray, rows),
        Context(COUNTS),
    )
    logits, queries = np.split(first.swapaxes(0, 1), [5], axis=-1)
    keys = 2 * second.swapaxes(0, 1)[..., 5:]
    contrast = contrast_twin(queries, keys, queue, 0.5)
    np.testing.assert_allclose(found.total, twin(logits, 2, 0.7) + 0.4 * contrast, rtol=1e-6)
    np.testing.assert_allclose(found.terms["contrast"], 0.4 * contrast, rtol=1e-6)
    np.testing.assert_allclose(found.method_state["queue"], [*keys.swapaxes(0, 1), queue[0]])
    assert found.batch_stats == pytest.approx(first.mean())
    assert found.method_state["batch_stats"] == pytest.approx(second.mean())


@pytest.mark.integration
def test_contrast_takes_a_view_and_keeps_state() -> None:
    """A queue with a projection of each network; NCL without it has none of this."""
    method, plain = parts("ncl_contrast")[0], parts("ncl")[0]
    assert (method.views, method.needs_global_batch) == (2, True)
    queue = fresh("ncl_contrast").method_state["queue"]
    assert queue.shape == (method.queue_size, 3, method.width)
    assert (plain.views, plain.needs_global_batch, fresh("ncl").method_state) == (1, False, {})


def test_values_that_are_not_valid() -> None:
    with pytest.raises(ValueError, match=r"config.method.contrast must be from 0 to 1000000, got"):
        NCL(contrast=-1.0)
    with pytest.raises(ValueError, match=r"config.method.hard_share must be from 0 to 1, got 2"):
        NCL(hard_share=2.0)
