# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 against `efficientnet-lite-pytorch`, and the reading of its weights."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from balpoe_jax.errors import UserError
from balpoe_jax.models import create_model, pretrained
from tests.helpers import ROOT, drawn_weights

FILE = ROOT / "tests" / "fixtures" / "efficientnet_lite0.npz"
NAME = "efficientnet_lite0"
SIDE = 64


def shapes() -> dict[str, tuple[int, ...]]:
    with np.load(FILE) as arrays:
        lines = [str(line).split(" ", 1) for line in arrays["names"]]
    return {name: ast.literal_eval(shape) for name, shape in lines}


def make(**options):
    options = {"num_classes": 6, "num_experts": 1, **options}
    model = create_model(NAME, **options)

    def init(key):
        return model.init(key, jnp.zeros((1, SIDE, SIDE, 3)), train=False)

    return model, init


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lite0.npz"
    np.savez(path, **drawn_weights.draw(shapes()))
    return path


def test_it_has_the_published_number_of_parameters() -> None:
    _, init = make(num_classes=1000, classifier="linear")
    found = jax.eval_shape(init, jax.random.key(0))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(found)) == 4_652_008


@pytest.mark.integration
@pytest.mark.slow_cases("8-2", "-1-2")
@pytest.mark.parametrize(("shared", "experts"), [(8, 2), (None, 3), (-1, 2)])
def test_features_are_those_of_pytorch(
    weights_file: Path, shared: int | None, experts: int
) -> None:
    model, init = make(num_experts=experts, shared_stages=shared)
    abstract = jax.eval_shape(init, jax.random.key(0))
    weights = pretrained.read(str(weights_file), NAME, abstract)

    @jax.jit
    def run(key, weights, images):
        return model.apply(pretrained.insert(init(key), weights), images, train=False)

    found = run(jax.random.key(0), weights, drawn_weights.images(2, SIDE))
    with np.load(FILE) as arrays:
        expected = arrays["features"]
    assert found.features.shape == (experts, 2, 1280)
    for features in found.features:
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5 * expected.max())
    # Their classifiers are their own.
    assert experts == 1 or np.abs(found.logits[0] - found.logits[1]).max() > 0.1


def test_all_but_the_classifier_is_read(weights_file: Path) -> None:
    _, init = make(num_experts=3)
    abstract = jax.eval_shape(init, jax.random.key(0))
    weights = pretrained.read(str(weights_file), NAME, abstract)
    every = {"/".join(place) for place in traverse_util.flatten_dict(abstract)}
    assert every - weights.keys() == {"params/expert/head/kernel"}
    assert sum(array.size for array in weights.values()) == sum(
        int(np.prod(shape))
        for name, shape in shapes().items()
        if not name.startswith("_fc") and not name.endswith("num_batches_tracked")
    )


def change(content: dict, name: str, value) -> dict:
    return {k: v for k, v in {**content, name: value}.items() if v is not None}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_bn0.weight", None, r"1 missing \(_bn0.weight\); name a file of the network"),
        ("_blocks.16._bn0.weight", np.ones(3), r"1 unexpected \(_blocks.16._bn0.weight\)"),
        ("_bn0.weight", np.ones(3), r"another network than efficientnet_lite0: _bn0.weight \(3,\)"),
        ("_bn0.bias", np.full(32, np.inf), "damaged: values are not finite in _bn0.bias"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, name: str, value, message: str) -> None:
    _, init = make()
    np.savez(tmp_path / "w.npz", **change(drawn_weights.draw(shapes()), name, value))
    with pytest.raises(UserError, match=message):
        pretrained.read(str(tmp_path / "w.npz"), NAME, jax.eval_shape(init, jax.random.key(0)))


def test_networks_without_known_files_are_refused() -> None:
    with pytest.raises(UserError, match="is for efficientnet_lite0, and not for resnet32"):
        pretrained.read("w.npz", "resnet32", {})


def test_what_is_of_resnets_is_refused() -> None:
    with pytest.raises(UserError, match="reduce_dimension is not for efficientnet_lite0"):
        make(reduce_dimension=True)
    with pytest.raises(UserError, match=r"from -1 \(nothing is shared\) to 8, got 9"):
        make(shared_stages=9)
    with pytest.raises(UserError, match="must be eight numbers"):
        make(stage_sizes=(1, 1, 1))
