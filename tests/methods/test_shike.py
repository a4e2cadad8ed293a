# SPDX-License-Identifier: Apache-2.0
"""SHIKE: its losses and its network are its code's, its paths a slow twin, its second phase the
classifiers' alone."""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.settings import learning_rates
from balpoe_jax.methods import Context, Network
from balpoe_jax.methods.base import map_by_path
from balpoe_jax.methods.shike import SHIKE, ShallowPath, ShallowPaths
from balpoe_jax.models import create_model
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config
from tests.helpers.golden import golden, max_relative
from tests.helpers.method_steps import moved
from tests.helpers.mixed_rows import log_probability
from tests.helpers.reference_weights import seeded_value


def unmixed(labels: np.ndarray, images: np.ndarray | None = None) -> TrainBatch:
    return TrainBatch((images,), labels, labels, np.ones(len(labels)))


def twin_of_the_first_phase(logits, label: int, distillation: float, suppression: float) -> list:
    """The loss of each expert for one image, `logits` being `[E, C]`."""
    experts, classes = logits.shape
    wrong = [c for c in range(classes) if c != label]
    mean = [sum(logits[e, c] for e in range(experts)) / experts for c in range(classes)]
    hardest = max(wrong, key=lambda c: mean[c])
    together, losses = np.zeros(classes), []
    for c in wrong:
        together[c] = mean[c] if c == hardest else max(logits[:, c])
    for e in range(experts):
        loss = -log_probability(logits[e], label)
        for other in range(experts):
            if other == e:
                continue
            for c in range(classes):
                p, q = log_probability(logits[other], c), log_probability(logits[e], c)
                loss += distillation / classes * np.exp(p) * (p - q)
        own = [-30.0 if c == label else logits[e, c] for c in range(classes)]
        for c in range(classes):
            p, q = log_probability(together, c), log_probability(np.array(own), c)
            loss += suppression / classes * np.exp(p) * (p - q)
        losses.append(loss)
    return losses


@pytest.mark.integration
def test_the_losses_are_their_twins(x64) -> None:
    random, counts = np.random.default_rng(0), np.array([50, 20, 10, 2])
    logits, labels = random.normal(size=(3, 8, 4)) * 3, np.arange(8) % 4
    method, context = SHIKE(distillation=0.7, suppression=4.0), Context(counts)
    first = method.expert_losses(jnp.asarray(logits), unmixed(labels), context)
    second = method.balanced_losses(jnp.asarray(logits), unmixed(labels), context)
    for i, label in enumerate(labels):
        expected = twin_of_the_first_phase(logits[:, i], label, 0.7, 4.0)
        np.testing.assert_allclose(first[:, i], expected, rtol=1e-12)
        balanced = [-log_probability(z + np.log(counts), label) for z in logits[:, i]]
        np.testing.assert_allclose(second[:, i], balanced, rtol=1e-6)  # by a prior in float32


@pytest.mark.integration
@pytest.mark.parametrize(("phase", "name", "rtol"), [(0, "plain", 1e-12), (1, "balanced", 1e-6)])
def test_losses_and_gradients_are_the_codes(phase: int, name: str, rtol: float, x64) -> None:
    case = golden("shike")
    context, loss = Context(case["counts"]), SHIKE().phases()[phase].loss

    def total(logits: jax.Array) -> jax.Array:
        batch = unmixed(case["labels"], jnp.moveaxis(logits, 0, 1))
        return loss(tiny_network.logits_as_images, {}, batch, context).total

    found, gradient = jax.value_and_grad(total)(jnp.asarray(case["logits"]))
    np.testing.assert_allclose(found, case[f"{name}_loss"], rtol=rtol)
    assert max_relative(gradient, case[f"{name}_grad"]) < rtol


# The network


LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def authors_name(path: str, expert: int | None) -> str:
    """What the code calls a parameter or statistic."""
    *modules, leaf = path.split("/")
    leaf = LEAVES.get(leaf, leaf)
    if modules[0] == "trunk":
        return ".".join([*(m.removeprefix("block") for m in modules[1:]), leaf])
    if modules[0] == "shallow":
        owner, layer, number = modules[1].removeprefix("paths_"), modules[2][:-1], modules[2][-1]
        inner = ("conv", "bn").index(layer)
        return f"shallow_exps.{owner}.convs.StridedConv{number}.conv.{inner}.{leaf}"
    if modules[1] == "head":
        return f"classifiers.{expert}.{leaf}"
    _, _, stage, block, layer = modules
    return f"{stage}s.{expert}.{block.removeprefix('block')}.{layer}.{leaf}"


def authors_values(tree):
    """A tree like this one, of the values that the names in the code seed."""

    def value(path: str, leaf) -> np.ndarray:
        if not path.startswith("expert/"):
            return _value(authors_name(path, None), leaf.shape)
        return np.stack(
            [_value(authors_name(path, e), leaf.shape[1:]) for e in range(leaf.shape[0])]
        )

    return map_by_path(value, tree)


def _value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 4:
        shape = (shape[3], shape[2], shape[0], shape[1])
    found = seeded_value(f"shike.{name}", shape).astype(np.float64)
    return found.transpose(2, 3, 1, 0) if found.ndim == 4 else found


def by_authors_names(tree) -> dict[str, np.ndarray]:
    """Gradients by their names in the code, in its layout."""
    found = {}

    def keep(path: str, leaf) -> None:
        rows = [(None, leaf)] if not path.startswith("expert/") else enumerate(leaf)
        for expert, row in rows:
            row = np.asarray(row)
            found[authors_name(path, expert)] = row.transpose(3, 2, 0, 1) if row.ndim == 4 else row

    map_by_path(keep, tree)
    return found


def fused(**options) -> tuple[Context, Network]:
    """SHIKE on a ResNet-8 with the code's weights."""
    context = Context(golden("shike")["counts"])
    ensemble = create_model("resnet8", num_classes=5, num_experts=3, shared_stages=2, **options)
    module = SHIKE().network(ensemble, context)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    )
    return context, Network(module, **{name: authors_values(x) for name, x in shapes.items()})


def network_images() -> np.ndarray:
    """Drawn again from their seed."""
    images = np.round(np.random.default_rng(1).standard_normal((6, 8, 8, 3)) * 32) / 32
    assert zlib.crc32(images.astype(np.float32).tobytes()) == golden("shike/network")["crc32"]
    return images


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("expert_map", ["loop", "vmap", "stacked"])
def test_logits_and_gradients_of_the_network_are_the_codes(expert_map: str, x64) -> None:
    """But for its shortcuts, which have no parameters in the fixture either."""
    case, images = golden("shike/network"), network_images()
    context, network = fused(expert_map=expert_map)
    evaluated, _ = network(images, train=False)
    assert max_relative(evaluated.logits, case["logits_eval"]) < 1e-9
    batch = unmixed(golden("shike")["labels"], images)

    def total(params) -> tuple[jax.Array, jax.Array]:
        trained = Network(network.module, params, network.batch_stats)
        losses = SHIKE().loss(trained, {}, batch, context)
        return losses.total, trained(images)[0].logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(network.params)
    assert max_relative(logits, case["logits_train"]) < 1e-9
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-9)
    found, stored = by_authors_names(grads), golden("shike/network/grad")
    assert len(stored) == 8
    for name, expected in stored.items():
        np.testing.assert_allclose(np.linalg.norm(found[name]), expected[0], rtol=1e-7)
        scale = np.abs(expected[1:]).max()
        np.testing.assert_allclose(found[name].ravel()[:8], expected[1:], atol=1e-7 * scale)


def twin_of_a_path(x: np.ndarray, params: dict, count: int) -> np.ndarray:
    """Of float `[B, H, W, in]`, with the statistics of the batch."""
    for i in range(count):
        kernel, (height, width) = params[f"conv{i}"]["kernel"], x.shape[1:3]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows, columns = range(0, height, 2), range(0, width, 2)
        y = np.zeros((len(x), len(rows), len(columns), kernel.shape[-1]))
        for a, row in enumerate(rows):
            for b, column in enumerate(columns):
                window = padded[:, row : row + 3, column : column + 3]
                y[:, a, b] = np.einsum("nhwc,hwco->no", window, kernel)
        mean, var = y.mean(axis=(0, 1, 2)), y.var(axis=(0, 1, 2))
        x = (y - mean) / np.sqrt(var + 1e-5) * params[f"bn{i}"]["scale"] + params[f"bn{i}"]["bias"]
        if count == 1 or i < count - 1:
            x = np.maximum(x, 0)
    return x


@pytest.mark.integration
def test_paths_are_their_twin_and_begin_at_the_stages_in_turn(x64) -> None:
    random = np.random.default_rng(0)
    maps = [random.normal(size=(2, side, side, width)) for side, width in ((7, 2), (4, 3))]
    module = ShallowPaths([ShallowPath((3, 5)), ShallowPath((5,)), ShallowPath((3, 5))])
    params = module.init(jax.random.key(0), maps, False)["params"]
    params = jax.tree.map(lambda x: random.normal(size=x.shape), params)
    statistics = module.init(jax.random.key(0), maps, False)["batch_stats"]
    variables = {"params": params, "batch_stats": statistics}
    found, _ = module.apply(variables, maps, True, mutable=["batch_stats"])
    for e, (beginning, count) in enumerate(((0, 2), (1, 1), (0, 2))):
        expected = twin_of_a_path(maps[beginning], params[f"paths_{e}"], count)
        np.testing.assert_allclose(found[e], expected, rtol=1e-9, atol=1e-9)


def test_the_paths_of_each_network_end_in_its_last_map() -> None:
    def shapes(name: str, side: int, **options) -> list[tuple[int, ...]]:
        ensemble = create_model(name, num_classes=3, num_experts=4, **options)
        module = SHIKE().network(ensemble, Context(np.ones(3)))
        make = lambda: module.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), False)  # noqa: E731
        paths = jax.eval_shape(make)["params"]["shallow"]
        return [
            tuple(path[f"conv{i}"]["kernel"].shape[-1] for i in range(len(path) // 2))
            for path in (paths[f"paths_{e}"] for e in range(4))
        ]

    assert shapes("resnet8", 8, shared_stages=2, width=2) == [(64, 128), (128,)] * 2
    assert shapes("resnet8", 8, reduce_dimension=True) == [(24, 48)] * 4
    small = {"stage_sizes": (1, 1, 1, 1), "shared_stages": 3}
    deepest = (512, 1024, 2048)
    assert shapes("resnet50", 64, **small) == [deepest, deepest[1:], deepest[2:], deepest]


@pytest.mark.parametrize("shared", [-1, 0])
def test_experts_without_a_common_stage_are_refused(shared: int) -> None:
    ensemble = create_model("resnet8", num_classes=3, num_experts=2, shared_stages=shared)
    with pytest.raises(UserError, match=r"share at least one stage, got none; set model.shared_"):
        SHIKE().network(ensemble, Context(np.ones(3)))


# The training


@pytest.mark.integration
def test_the_second_phase_trains_new_classifiers_alone(x64) -> None:
    assert moved("shike") == {"expert/head/kernel", "statistics"}
    params = {"expert": {"head": {"kernel": jnp.ones((3, 8, 5))}, "body": jnp.ones(3)}}
    begun = SHIKE().phases()[1].begin(params, jax.random.key(0), Context(np.ones(5)))
    kernel = begun["expert"]["head"]["kernel"]
    np.testing.assert_allclose(jnp.linalg.norm(kernel, axis=1), 1, rtol=1e-6)
    assert len({float(kernel[e, 0, 0]) for e in range(3)}) == 3
    np.testing.assert_array_equal(begun["expert"]["body"], 1)


def test_rates_are_the_codes() -> None:
    settings = resolve(get_config("cifar100_lt", "method=shike"))
    first, second = (learning_rates(phase) for phase in settings.phases)
    np.testing.assert_allclose(first, golden("shike/rates")["first"], rtol=1e-12)
    np.testing.assert_allclose(second, golden("shike/rates")["second"], rtol=1e-12)
    assert settings.model.shared_stages == 2 and settings.model.num_experts == 3
    assert (settings.augment.policy, settings.augment.cutout) == ("autoaugment_cifar", 16)


def test_parameters_are_as_many_as_stated() -> None:
    """The code's, 1,257,808 without the second phase's classifiers, has 7,104 in its shortcuts."""
    ensemble = create_model("resnet32", num_classes=100, num_experts=3, shared_stages=2)
    module = SHIKE().network(ensemble, Context(np.ones(100)))
    init = partial(module.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 1_257_808 - 7_104
