# SPDX-License-Identifier: Apache-2.0
"""GLMC: its loss is a slow twin of its formula and its code's, and both of its views are mixed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.methods import Context, Network
from balpoe_jax.methods.base import map_by_path
from balpoe_jax.methods.glmc import GLMC, class_weights, disagreement
from balpoe_jax.models import create_model
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config
from tests.helpers.golden import golden, max_relative
from tests.helpers.mixed_rows import log_probability
from tests.helpers.reference_weights import seeded_value

COUNTS = tiny_network.COUNTS


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


@pytest.mark.slow  # the numbers of the code are compared in any run
@pytest.mark.parametrize("epoch", [0, 3])
def test_the_loss_is_its_twin(epoch: int, x64) -> None:
    """From the network's outputs for each view by itself; in the first epoch all is plain."""
    method = GLMC(consistency=2.0, reweighting=0.7, width=6, cumulative_epochs=5)
    context = Context(COUNTS, steps_per_epoch=2).at(2 * epoch)
    module = method.network(tiny_network.experts(1, classifier="linear"), context)
    variables = jax.tree.map(lambda x: x.astype(np.float64), tiny_network.init(module))
    network, batch = Network(module, **variables), tiny_network.batch(8, dtype=np.float64, views=2)
    found = method.loss(network, {}, batch, context)
    first, second = (network(view)[0] for view in batch.views)
    weights = [n**-0.7 for n in COUNTS]
    weights = [len(COUNTS) * weight / sum(weights) for weight in weights]
    losses = {"plain": 0.0, "weighted": 0.0, "disagreement": 0.0}
    for own, other in ((first, second), (second, first)):
        for i in range(8):
            shares = [(batch.labels[i], batch.mix_weight[i])]
            shares.append((batch.other_labels[i], 1 - batch.mix_weight[i]))
            for label, share in shares:
                plain = log_probability(np.asarray(own.plain_logits[0, i]), label)
                predicted = log_probability(np.asarray(own.logits[0, i]), label)
                losses["plain"] -= share * plain / 8
                losses["weighted"] -= weights[label] * share * predicted / 8
            apart = cosine(np.asarray(own.predictions[i]), np.asarray(other.projections[i]))
            losses["disagreement"] -= apart / 8
    moved = (epoch / 5) ** 2
    supervised = (1 - moved) * losses["plain"] + moved * losses["weighted"]
    for name, value in losses.items():
        np.testing.assert_allclose(found.terms[name], value, rtol=1e-9)
    np.testing.assert_allclose(found.by_expert, [supervised], rtol=1e-9)
    np.testing.assert_allclose(found.total, supervised + 2 * losses["disagreement"], rtol=1e-9)
    _, once = network(batch.views[0])
    _, twice = Network(module, variables["params"], once)(batch.views[1])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), found.batch_stats, twice)


def test_projections_get_no_gradient(x64) -> None:
    random = np.random.default_rng(0)
    p, z = (jnp.asarray(random.normal(size=(3, 4))) for _ in range(2))
    gradients = jax.grad(lambda *x: disagreement(*x).sum(), (0, 1))(p, z)
    assert not gradients[1].any()
    by_hand = tiny_network.numeric_gradient(
        lambda x: -sum(cosine(a, b) for a, b in zip(x, np.asarray(z), strict=True)), np.asarray(p)
    )
    np.testing.assert_allclose(gradients[0], by_hand, atol=1e-8)


def test_weights_have_a_mean_of_one_and_no_overflow() -> None:
    expected = np.array([1 / 50, 1 / 10, 1 / 2])
    np.testing.assert_allclose(
        class_weights(np.array([50, 10, 2]), 1.0), expected / expected.mean()
    )
    np.testing.assert_array_equal(class_weights(np.array([50, 10, 2]), 0.0), 1)
    assert np.isfinite(class_weights(np.array([10**9, 10**8]), 10.0)).all()


# The code's network and loss

PLACES = {"plain": "fc", "projection": "projection_head.0", "prediction": "contrast_head.0"}
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def authors_name(path: str) -> str:
    """What the code calls a parameter or statistic."""
    *modules, leaf = path.removeprefix("ensemble/").split("/")
    leaf = LEAVES.get(leaf, leaf)
    if modules[0] in PLACES:
        return f"{PLACES[modules[0]]}.{leaf}"
    if "head" in modules:
        return f"fc_cb.{leaf}"
    inner = [m.removeprefix("block") for m in modules if m not in ("trunk", "expert", "body")]
    return ".".join([*inner, leaf])


def in_authors_layout(path: str, leaf) -> np.ndarray:
    leaf = np.asarray(leaf)
    leaf = leaf[0] if "expert/" in path else leaf
    return leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T


def authors_value(path: str, leaf) -> np.ndarray:
    """What the name in the code seeds, in our layout."""
    shape = in_authors_layout(path, np.zeros(leaf.shape)).shape
    value = seeded_value(f"glmc.{authors_name(path)}", shape).astype(np.float64)
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return value.reshape(leaf.shape)


@pytest.mark.integration
def test_loss_and_gradients_are_the_codes(x64) -> None:
    """Of its training loop, for both mixtures that it made, in the last of four epochs."""
    case, running = golden("glmc"), golden("glmc/running")
    method = GLMC(reweighting=1.2, consistency=4.0, cumulative_epochs=4)
    context = Context(case["counts"]).at(3)
    ensemble = create_model("resnet8", num_classes=5, num_experts=1, classifier="linear")
    module = method.network(ensemble, context)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    )
    variables = {name: map_by_path(authors_value, tree) for name, tree in shapes.items()}
    share = np.full(6, case["share"])
    views = (case["first"], case["second"])
    batch = TrainBatch(views, case["labels"], case["other_labels"], share)
    evaluated, _ = Network(module, **variables)(views[0], train=False)
    assert max_relative(evaluated.logits[0], case["logits_eval"]) < 1e-9

    def total(params):
        losses = method.loss(Network(module, params, variables["batch_stats"]), {}, batch, context)
        return losses.total, losses.batch_stats

    (loss, statistics), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(
        variables["params"]
    )
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-9)
    found = {}
    for tree in (grads, statistics):
        map_by_path(
            lambda path, x: found.update({authors_name(path): in_authors_layout(path, x)}), tree
        )
    stored = golden("glmc/grad")
    assert len(stored) == 9
    for name, expected in stored.items():
        np.testing.assert_allclose(np.linalg.norm(found[name]), expected[0], rtol=1e-7)
        scale = np.abs(expected[1:]).max()
        given = expected[1:]
        flat = found[name].ravel()[: len(given)]
        np.testing.assert_allclose(flat, given, atol=1e-7 * scale, err_msg=name)
    for name, expected in running.items():
        assert max_relative(found[name], expected) < 1e-9, name


@pytest.mark.parametrize(("train", "parameters"), [(False, 7_409_316), (True, 7_484_424)])
def test_the_published_network_has_as_many_parameters(train: bool, parameters: int) -> None:
    """Of the code's on CIFAR-100, 64, 128 and 256 channels wide, in evaluation and in training."""
    settings = resolve(get_config("cifar100_lt", "method=glmc"))
    model = settings.model
    module = create_model(
        model.name,
        num_classes=100,
        num_experts=model.num_experts,
        classifier=model.classifier,
        width=model.width,
    )
    if train:
        module = settings.method.network(module, Context(np.ones(100)))
    init = partial(module.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters


# The training


@pytest.mark.parametrize(
    ("data", "ratio", "power", "weight", "consistency"),
    [
        ("cifar100_lt", 100, 1.0, 1.2, 4.0),
        ("cifar100_lt", 50, 0.8, 1.2, 6.0),
        ("cifar100_lt", 10, 0.8, 1.2, 4.0),
        ("cifar10_lt", 100, 1.0, 1.2, 1.0),
        ("cifar10_lt", 50, 1.0, 1.2, 1.0),
        ("cifar10_lt", 10, 0.8, 1.0, 2.0),
    ],
)
def test_what_each_ratio_is_trained_with(
    data: str, ratio: int, power: float, weight: float, consistency: float
) -> None:
    """By the commands on the authors' page, whose exponent of an image's odds is 1 - power."""
    settings = resolve(get_config(data, f"method=glmc,ir={ratio}"))
    method, mix = settings.method, settings.mix
    assert (method.reweighting, method.consistency) == (weight, consistency)
    assert (mix.rule, mix.partners, mix.alpha) == ("mixup_and_cutmix", "sampler", 1.0)
    assert mix.sampling_power == power and method.cumulative_epochs == settings.total_epochs
    optim = settings.optim
    assert (optim.learning_rate, optim.weight_decay, settings.batch_size) == (0.01, 5e-3, 64)
    assert settings.view2 == settings.augment and not settings.augment.rotation


def test_the_rule_and_the_method_mix_as_many_views() -> None:
    config = get_config("digits_lt", "method=glmc")
    config.mix.rule = "mixup"
    with pytest.raises(UserError, match=r"glmc mixes 2 of its views: config.mix.rule must be mixu"):
        resolve(config)
    config.mix.alpha = 0.0
    assert resolve(config).mix.alpha == 0
    config = get_config("digits_lt")
    config.mix.rule = "mixup_and_cutmix"
    with pytest.raises(
        UserError, match=r"mixes 1 of its views: config.mix.rule must not be mixup_"
    ):
        resolve(config)


def test_several_experts_are_refused() -> None:
    with pytest.raises(UserError, match="GLMC trains one expert, got 2; leave experts alone"):
        GLMC().network(tiny_network.experts(2), Context(COUNTS))
