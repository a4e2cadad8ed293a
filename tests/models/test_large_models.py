# SPDX-License-Identifier: Apache-2.0
"""ResNets and ResNeXt for large images against the reference's numbers, and their options."""

import zlib
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from balpoe_jax.errors import UserError
from balpoe_jax.losses import balpoe_loss
from balpoe_jax.models import IMAGENET_MODELS, create_model
from balpoe_jax.torch_import import check_against, convert
from tests.helpers.golden import golden, max_relative
from tests.helpers.reference_weights import (
    large_reference_shapes,
    large_reference_state,
    to_reference,
)

# Networks of the reference's size run for longer than they are compiled.
pytestmark = pytest.mark.optimised

# Compiled in half the time; the numbers of these small problems need no fast code.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# A block in each stage but one, for what does not need the whole network.
SMALL: dict[str, Any] = {"num_classes": 6, "stage_sizes": (1, 2, 1, 1)}


def reference_images(name: str) -> np.ndarray:
    """The inputs of a golden case, drawn again from their seed."""
    case = golden(name)
    draws = np.random.default_rng(int(case["seed"])).standard_normal(case["x_shape"])
    images = np.round(draws * 32) / 32
    assert zlib.crc32(images.astype(np.float32).tobytes()) == case["x_crc32"]
    return images


def reference_variables(**options: Any) -> Any:
    return convert(large_reference_state(num_classes=20, **options))


def as_double(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def abstract_variables(name: str, **options: Any) -> Any:
    model = create_model(name, **options)
    image = jnp.zeros((1, 32, 32, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))


# Against the reference.


@pytest.mark.integration
@pytest.mark.slow_cases(
    "resnet50/nonsquare-loop-options2",
    "resnet50/nonorm-vmap-options1",
    "resnext50/experts1-vmap-options3",
)
@pytest.mark.parametrize(
    ("case", "expert_map", "options"),
    [
        ("resnet50/experts1_reduce", "loop", {"num_experts": 1, "reduce_dimension": True}),
        ("resnet50/nonorm", "vmap", {"num_experts": 2, "classifier": "linear"}),
        ("resnet50/nonsquare", "loop", {"num_experts": 2}),
        ("resnext50/experts1", "vmap", {"num_experts": 1}),
    ],
)
def test_logits_are_the_references(case: str, expert_map: str, options: dict, x64) -> None:
    name = case.partition("/")[0]
    model = create_model(name, num_classes=20, expert_map=expert_map, **options)
    variables = as_double(reference_variables(grouped=name == "resnext50", **options))

    @jit
    def both(variables, images):
        evaluated = model.apply(variables, images, train=False)
        trained, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return evaluated.logits, trained.logits

    evaluated, trained = both(variables, jnp.asarray(reference_images(case)))
    assert max_relative(evaluated, golden(case)["logits_eval_f64"]) < 1e-9
    assert max_relative(trained, golden(case)["logits_train_f64"]) < 1e-8


@pytest.mark.slow
def test_gradients_are_the_references(x64) -> None:
    """Of a few parameters from stem to head: all filters' gradients take a CPU a minute."""
    case, images = golden("resnet50/main"), reference_images("resnet50/main")
    model = create_model("resnet50", num_classes=20, num_experts=3)
    variables = as_double(reference_variables(num_experts=3))
    prior = jnp.log(case["class_counts"] / case["class_counts"].sum() + 1e-9)
    params = flatten_dict(variables["params"], sep="/")
    chosen = {
        path: params.pop(path)
        for path in (
            "trunk/conv1/kernel",
            "trunk/bn1/scale",
            "trunk/layer2/block1/conv2/kernel",
            "expert/body/layer3/block0/bn2/scale",
            "expert/body/layer4/block2/bn3/bias",
            "expert/head/kernel",
        )
    }

    @jax.jit
    @jax.value_and_grad
    def loss_fn(chosen, others, stats):
        params = unflatten_dict(others | chosen, sep="/")
        outputs, _ = model.apply(
            {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
        )
        return balpoe_loss(outputs.logits, jnp.asarray(case["labels"]), prior, case["taus"]).mean()

    loss, grads = loss_fn(chosen, params, variables["batch_stats"])
    np.testing.assert_allclose(loss, case["loss_f64"], rtol=1e-9)
    by_name = to_reference(unflatten_dict(grads, sep="/"))
    stored = golden("resnet50/main/grad_f64")
    assert len(stored) == 10
    for name, expected in stored.items():
        assert max_relative(by_name[name].ravel()[:64], expected) < 1e-7, name


@pytest.mark.integration
@pytest.mark.slow_cases("resnet101-44549160", "resnet152-60192808")
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("resnext50", 25_028_904),
    ],
)
def test_one_expert_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """That of torchvision's network of the name, with the linear classifier of 1000 classes."""
    params = abstract_variables(name, num_classes=1000, num_experts=1, classifier="linear")[
        "params"
    ]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


# What each expert has for itself of ResNet-50: all, all but the stem, or the last stage and head.
@pytest.mark.parametrize(
    ("shared", "own"), [(-1, 25_557_032), (0, 25_547_496), (3, 14_964_736 + 2_049_000)]
)
def test_experts_share_as_much_as_they_are_asked_to(shared: int, own: int) -> None:
    params = abstract_variables(
        "resnet50", num_classes=1000, num_experts=3, classifier="linear", shared_stages=shared
    )["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_557_032 + 2 * own


@pytest.mark.slow_cases("resnet101", "resnet152")
@pytest.mark.parametrize("name", IMAGENET_MODELS)
def test_shapes(name: str) -> None:
    model = create_model(name, num_experts=3, **SMALL)

    def run(key):
        variables = model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)
        shared = model.trunk.apply(
            {part: tree["trunk"] for part, tree in variables.items()},
            jnp.zeros((2, 49, 64, 3)),
            train=False,
        )
        return variables, shared, model.apply(variables, jnp.zeros((2, 49, 64, 3)), train=False)

    variables, shared, outputs = jax.eval_shape(run, jax.random.key(0))
    assert shared.shape == (2, 7, 8, 512)
    assert outputs.logits.shape == (3, 2, 6)
    assert outputs.features.shape == (3, 2, 2048)
    expert = variables["params"]["expert"]
    assert set(expert["body"]) == {"layer3", "layer4"} and set(expert) == {"body", "head"}
    assert set(variables["params"]["trunk"]) == {"conv1", "bn1", "layer1", "layer2"}
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(expert))


@pytest.mark.slow
@pytest.mark.integration
def test_initial_values_have_the_references_distributions() -> None:
    model = create_model(
        "resnext50", num_classes=100, num_experts=2, classifier="linear", stage_sizes=(1, 1, 1, 1)
    )
    params = jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))[
        "params"
    ]
    # Normal with the number of outgoing connections, whatever the groups.
    block = params["expert"]["body"]["layer4"]["block0"]
    np.testing.assert_allclose(np.std(block["conv2"]["kernel"]), np.sqrt(2 / (9 * 1024)), rtol=0.01)
    np.testing.assert_allclose(np.std(block["conv3"]["kernel"]), np.sqrt(2 / 2048), rtol=0.01)
    np.testing.assert_allclose(
        np.std(params["trunk"]["conv1"]["kernel"]), np.sqrt(2 / (49 * 64)), rtol=0.05
    )
    # Uniform in (-1, 1) / sqrt(2048).
    head = params["expert"]["head"]["dense"]
    bound = 2048**-0.5
    for leaf, rtol in ((head["kernel"], 0.01), (head["bias"], 0.15)):
        assert np.abs(leaf).max() <= bound
        np.testing.assert_allclose(np.std(leaf), bound / np.sqrt(3), rtol=rtol)


# Options.


def loss_and_gradients(model: Any, variables: Any, images: Any) -> Any:
    """With a loss in which every logit counts."""
    weights = jax.random.normal(jax.random.key(2), (2, len(images), 6), images.dtype)

    @jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss_fn(params):
        outputs, updated = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return (weights * outputs.logits).sum(), updated

    return loss_fn(variables["params"])


@cache
def small_variables(name: str) -> Any:
    grouped = name == "resnext50"
    return convert(large_reference_state(num_experts=2, grouped=grouped, **SMALL))


@pytest.mark.slow_cases("loop", "vmap")
@pytest.mark.parametrize("expert_map", ["loop", "vmap"])
def test_expert_map_and_rematerialisation_change_nothing(expert_map: str, x64) -> None:
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3), jnp.float64)
    variables = as_double(small_variables("resnet50"))
    expected = loss_and_gradients(
        create_model("resnet50", num_experts=2, **SMALL), variables, images
    )
    model = create_model("resnet50", num_experts=2, expert_map=expert_map, remat=True, **SMALL)
    assert_same(loss_and_gradients(model, variables, images), expected)


@pytest.mark.slow
@pytest.mark.integration
def test_expert_map_changes_nothing_in_grouped_convolutions(x64) -> None:
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3), jnp.float64)
    variables = as_double(small_variables("resnext50"))
    expected, result = (
        jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)
        for model in (
            create_model("resnext50", num_experts=2, expert_map=expert_map, **SMALL)
            for expert_map in ("loop", "vmap")
        )
    )
    assert_same(result, expected)


def assert_same(result: Any, expected: Any) -> None:
    chex.assert_trees_all_equal_structs(result, expected)
    for leaf, expected_leaf in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert max_relative(leaf, expected_leaf) < 1e-9


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("expert_map", ["loop", "vmap"])
def test_rematerialisation_convolves_again_in_the_backward_pass(expert_map: str) -> None:
    images = jnp.zeros((2, 32, 32, 3))
    counts, variables = [], []
    for remat in (False, True):
        model = create_model("resnet50", num_experts=2, expert_map=expert_map, remat=remat, **SMALL)
        init = partial(model.init, jax.random.key(0), images, train=False)
        variables.append(jax.eval_shape(init))
        stats = variables[-1]["batch_stats"]

        def loss(params, stats, model=model):
            variables = {"params": params, "batch_stats": stats}
            return model.apply(variables, images, train=True, mutable=["batch_stats"])[
                0
            ].logits.sum()

        gradient = jax.make_jaxpr(jax.grad(loss))(variables[-1]["params"], stats)
        counts.append(str(gradient).count("conv_general_dilated["))
    chex.assert_trees_all_equal_shapes_and_dtypes(*variables)
    # 20 forward, and for each two gradients, but for the images'; then 19 in blocks again.
    assert counts == [20 + 39, 20 + 39 + 19]


def test_half_precision_is_in_the_body_alone() -> None:
    images = jnp.zeros((4, 64, 64, 3))
    model = create_model("resnext50", num_experts=2, expert_map="vmap", dtype=jnp.bfloat16, **SMALL)
    created = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    apply = partial(model.apply, train=True, mutable=["batch_stats"])
    operands = [
        variable.aval.dtype
        for equation in jax.make_jaxpr(apply)(created, images).eqns
        if equation.primitive.name == "conv_general_dilated"
        for variable in equation.invars
    ]
    assert operands == [jnp.bfloat16] * 2 * 20  # the stem, three in a block, four shortcuts
    for tree in (created, jax.eval_shape(apply, created, images)):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_half_precision_rounds_a_little() -> None:
    images = jax.random.normal(jax.random.key(1), (4, 64, 64, 3))
    variables = small_variables("resnext50")
    whole = create_model("resnext50", num_experts=2, **SMALL)
    expected = jit(partial(whole.apply, train=False))(variables, images)
    model = create_model("resnext50", num_experts=2, expert_map="vmap", dtype=jnp.bfloat16, **SMALL)
    evaluate = jit(partial(model.apply, train=False))
    evaluated = evaluate(variables, images)
    error = max_relative(evaluated.logits, expected.logits)
    assert 1e-5 < error < 0.03
    # The first thing that happens to images; the input pipeline may do it as well.
    chex.assert_trees_all_equal(evaluated, evaluate(variables, images.astype(jnp.bfloat16)))


# Checkpoints.


@pytest.mark.integration
@pytest.mark.slow_cases("resnet101-options2", "resnext50-options4")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet50", {"num_experts": 1, "classifier": "linear"}),
        ("resnet50", {"num_experts": 3, "reduce_dimension": True}),
        ("resnet101", {"num_experts": 2, "stage_sizes": (3, 4, 23, 3)}),
        ("resnext50", {"num_experts": 7}),
        ("resnext50", {"num_experts": 1, "reduce_dimension": True, "classifier": "linear"}),
    ],
)
def test_a_checkpoint_gives_the_tree_of_its_model(name: str, options: dict) -> None:
    options = {**SMALL, **options}
    shapes = large_reference_shapes(grouped=name == "resnext50", **options)
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    expected = abstract_variables(name, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(convert(state), expected)
    check_against(convert(state), expected)


def zeros_of_a_checkpoint(**options: Any) -> dict[str, np.ndarray]:
    shapes = large_reference_shapes(**{**SMALL, "num_experts": 2, **options})
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def test_a_checkpoint_that_does_not_fit_is_reported_by_its_names() -> None:
    state = zeros_of_a_checkpoint()
    del state["backbone.layer3s.1.0.downsample.0.weight"], state["backbone.conv1.weight"]
    pattern = (
        r": missing backbone\.conv1\.weight, backbone\.layer3s\.1\.0\.downsample\.0\.weight\.$"
    )
    with pytest.raises(UserError, match=pattern):
        convert(state)


def test_refuses_a_checkpoint_of_another_family() -> None:
    variables = convert(zeros_of_a_checkpoint())
    with pytest.raises(UserError, match=r"layer1\.0\.bn1\.bias \(64,\) instead of \(128,\)"):
        check_against(variables, abstract_variables("resnext50", num_experts=2, **SMALL))
    with pytest.raises(UserError, match=r"unexpected .*backbone\.layer1\.0\.bn3\.bias"):
        check_against(variables, abstract_variables("resnet32", num_experts=2, num_classes=6))
