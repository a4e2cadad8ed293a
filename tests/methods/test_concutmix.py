# SPDX-License-Identifier: Apache-2.0
"""ConCutMix: its labels against a slow twin, its loss against the authors' numbers."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.methods import Context, Network
from balpoe_jax.methods.concutmix import ConCutMix, correct_labels
from balpoe_jax.methods.contrastive import ProjectedOutputs
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config
from tests.helpers.golden import golden, max_relative
from tests.helpers.method_steps import parts
from tests.helpers.tiny_network import COUNTS

RANDOM = np.random.default_rng(4)


def twin(labels, features, prototypes, counts, correction, nearest) -> np.ndarray:
    corrected = np.empty_like(labels)
    for i, label in enumerate(labels):
        part = correction * np.log((counts * label).sum()) / np.log(counts).sum()
        distances = [np.sqrt(((features[i] - p) ** 2).sum()) for p in prototypes]
        near = np.zeros(len(prototypes))
        for c in np.argsort(distances)[:nearest]:
            near[c] = 1 / distances[c]
        corrected[i] = part * near / near.sum() + (1 - part) * label
    return corrected


@pytest.mark.parametrize("nearest", [1, 3, 30])
def test_corrected_labels_are_their_twin(nearest: int, x64) -> None:
    """Of more prototypes than there are, all are near."""
    features, prototypes = RANDOM.normal(size=(6, 8)), RANDOM.normal(size=(5, 8))
    labels = RANDOM.dirichlet(np.ones(5), size=6)
    correct = partial(correct_labels, class_counts=COUNTS, correction=0.7, nearest=nearest)
    found = jax.jit(correct)(labels, features, prototypes)
    expected = twin(labels, features, prototypes, COUNTS, 0.7, min(nearest, 5))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-9)


def test_labels_stay_finite_distributions_at_the_ends() -> None:
    """On a prototype, with a part that would exceed 1, and without any class of two images."""
    prototypes = np.eye(5, 8, dtype="f4")
    labels = np.eye(5, dtype="f4")
    on_them = correct_labels(labels, prototypes, prototypes, COUNTS, 1e6, 5)
    np.testing.assert_allclose(on_them, np.eye(5), atol=1e-5)
    single = correct_labels(labels[::-1], prototypes, prototypes, np.ones(5), 1.0, 5)
    np.testing.assert_array_equal(single, labels[::-1])


class Given:
    """In the place of a module: the parameters are all of its outputs, but for the labels."""

    @staticmethod
    def apply(variables, images, train: bool, mutable: list[str]):
        logits, projections, prototypes = variables["params"]
        outputs = ProjectedOutputs(logits[None], logits[None], projections, prototypes)
        return outputs, {"batch_stats": 0.0}


def of_the_authors(epoch: int, mixed: bool = True, **fields):
    """The method, losses and gradients at an epoch, of the stored batch, and what is known."""
    known = SimpleNamespace(**golden("concutmix"))
    rows = len(known.labels)
    share = np.full(rows, known.share if mixed else 1, "f4")
    images = np.zeros((rows, 1), "f4")
    others = known.others if mixed else known.labels
    batch = TrainBatch((images,) * 3, known.labels, others, share)
    method = ConCutMix(
        temperature=0.3, tau=0.9, correction=0.5, nearest=3, plain_epochs=4, **fields
    )
    context = Context(COUNTS, steps_per_epoch=2).at(2 * epoch)

    def loss(logits, projections, prototypes):
        outputs = (jnp.tile(logits, (3, 1)), projections.reshape(3 * rows, -1), prototypes)
        found = method.loss(Network(Given(), outputs, 0.0), {}, batch, context)
        return found.total, found

    given = (known.logits, known.projections, known.prototypes)
    arguments = [jnp.asarray(x, jnp.float32) for x in given]
    gradients, found = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments)
    return known, found, gradients


def test_a_corrected_batch_is_that_of_the_authors_code() -> None:
    known, found, gradients = of_the_authors(epoch=4)
    for name in ("classification", "contrast"):
        np.testing.assert_allclose(found.terms[name], getattr(known, name), rtol=1e-5)
    np.testing.assert_allclose(found.total, known.total, rtol=1e-5)
    expected = (known.d_logits, known.d_projections, known.d_prototypes)
    for gradient, of_the_code in zip(gradients, expected, strict=True):
        assert max_relative(gradient, of_the_code) < 1e-5
    assert not np.any(gradients[1][0])  # labels are corrected without a gradient
    assert np.abs(known.classification - known.uncorrected) > 0.01


def test_labels_are_corrected_late_and_of_mixed_images_alone() -> None:
    known, early, _ = of_the_authors(epoch=3)
    np.testing.assert_allclose(early.terms["classification"], known.uncorrected, rtol=1e-5)
    plain = [of_the_authors(epoch, mixed=False)[1].terms["classification"] for epoch in (3, 4)]
    assert plain[0] == plain[1] != early.terms["classification"]


def test_corrected_labels_are_those_of_the_authors_code() -> None:
    known = SimpleNamespace(**golden("concutmix"))
    labels = known.share * np.eye(5)[known.labels] + (1 - known.share) * np.eye(5)[known.others]
    given = (labels, known.projections[0], known.prototypes)
    found = correct_labels(*(x.astype("f4") for x in given), COUNTS, 0.5, 3)
    np.testing.assert_allclose(found, known.corrected, atol=1e-6)


@pytest.mark.integration
def test_projections_and_prototypes_have_lengths_of_their_own() -> None:
    _, _, network = parts("concutmix", None)
    variables = tiny_network.init(network)
    images = tiny_network.batch(6).images
    outputs, _ = Network(network, **variables)(images)
    for rows in (outputs.projections, outputs.prototypes):
        assert np.ptp(np.linalg.norm(rows, axis=1)) > 1e-3
    assert outputs.prototypes.shape == (len(COUNTS), 128)


@pytest.mark.parametrize(
    ("data", "arguments", "fields"),
    [
        ("cifar100_lt", "ir=10", {"tau": 1, "nearest": 30, "plain_epochs": 101}),
        ("cifar100_lt", "ir=50", {"tau": 0.75, "correction": 20 / 255}),
        ("cifar100_lt", "ir=100", {"tau": 0.9, "plain_epochs": 101}),
        ("cifar100_lt", "ir=100,recipe=long", {"tau": 0.79, "plain_epochs": 161}),
        ("cifar10_lt", "ir=100", {"tau": 0.85, "nearest": 3, "correction": 2 / 255}),
        ("imagenet_lt", "", {"tau": 0.99, "plain_epochs": 71, "width": 1024}),
        ("imagenet_lt", "backbone=resnext50", {"plain_epochs": 61, "contrast": 0.35}),
        ("imagenet_lt", "backbone=resnext50,recipe=long", {"plain_epochs": 121}),
        ("inaturalist2018", "", {"plain_epochs": 81, "correction": 1628 / 255}),
    ],
)
def test_its_own_training_is_the_published_scripts(data: str, arguments: str, fields: dict) -> None:
    config = get_config(data, f"method=concutmix,{arguments}".rstrip(","))
    assert {name: config.method[name] for name in fields} == fields
    mix = resolve(config).mix
    assert (mix.rule, mix.alpha, mix.probability, mix.sampling_power) == ("cmo", 1, 0.5, 0)
    epochs = {71: 100, 61: 90, 121: 180, 81: 100, 161: 400}.get(config.method.plain_epochs, 200)
    assert config.total_epochs == epochs


def test_its_tau_is_shown_and_one_expert_it_is() -> None:
    assert ConCutMix(tau=0.9).expert_taus((0.0,)) == (0.9,)
    with pytest.raises(UserError, match="ConCutMix trains one expert, got 3; leave experts alone"):
        ConCutMix().network(tiny_network.experts(3), Context(COUNTS))
