# SPDX-License-Identifier: Apache-2.0
"""Networks against the reference's numbers, and what callers rely on."""

import zlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.losses import balpoe_loss
from balpoe_jax.models import CIFAR_MODELS, create_model
from balpoe_jax.torch_import import convert
from tests.helpers.golden import golden, max_relative
from tests.helpers.reference_weights import reference_state, to_reference, unbiased_statistics

# Options of the reference's variants; main is the paper's network.
VARIANTS = {
    "main": {"num_experts": 3},
    "experts1": {"num_experts": 1},
    "experts2": {"num_experts": 2},
    "experts7": {"num_experts": 7},
    "nonorm": {"num_experts": 3, "classifier": "linear"},
    "reduce": {"num_experts": 3, "reduce_dimension": True},
}


def reference_variables(**options):
    return jax.tree.map(jnp.asarray, convert(reference_state(num_classes=100, **options)))


def init(model, images, seed: int = 0):
    return jax.jit(lambda key: model.init(key, images[:1], train=False))(jax.random.key(seed))


def as_double(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def reference_images(name: str) -> np.ndarray:
    """The inputs of a variant, drawn again from their seed."""
    case = golden(f"resnet32/{name}")
    batch = 8 if name == "main" else 4
    draws = np.random.default_rng(int(case["seed"])).standard_normal((batch, 32, 32, 3))
    images = np.round(draws * 32) / 32
    assert zlib.crc32(images.astype(np.float32).tobytes()) == case["x_crc32"]
    return images


@pytest.mark.integration
@pytest.mark.slow_cases("experts1", "experts7", "experts2", "nonorm", "reduce", "main")
@pytest.mark.usefixtures("optimised_programs")
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_references(variant: str, x64) -> None:
    case, images = golden(f"resnet32/{variant}"), jnp.asarray(reference_images(variant))
    model = create_model("resnet32", num_classes=100, **VARIANTS[variant])
    variables = as_double(reference_variables(**VARIANTS[variant]))
    every = 1 if variant == "main" else 5  # classes that the fixture keeps
    # Not jitted: layers share their compiled operations, and the whole takes longer to compile.
    # Rows are evaluated each by itself, and two of them take a quarter of the time of eight.
    evaluated = model.apply(variables, images[:2], train=False)
    trained, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    expected = case["logits_eval_f64"][:, :2]
    assert max_relative(evaluated.logits[..., ::every], expected) < 1e-9
    assert max_relative(trained.logits[..., ::every], case["logits_train_f64"]) < 1e-9
    if "feat_train_f64" in case:
        assert max_relative(trained.features[:, :2], case["feat_train_f64"]) < 1e-9


@pytest.mark.integration
@pytest.mark.slow_cases("vmap")
@pytest.mark.parametrize("expert_map", ["loop", "vmap"])
def test_single_precision_is_the_references(expert_map: str) -> None:
    case, images = golden("resnet32/main"), reference_images("main").astype(np.float32)
    model = create_model("resnet32", num_classes=100, num_experts=3, expert_map=expert_map)
    outputs = model.apply(reference_variables(num_experts=3), images, train=False)
    assert outputs.logits.dtype == jnp.float32
    assert max_relative(outputs.logits, case["logits_eval_f64"]) < 5e-5


@pytest.mark.slow_cases("False", "True")
@pytest.mark.parametrize("mixup", [False, True])
def test_gradients_are_the_references(mixup: bool, x64) -> None:
    case, images = golden("resnet32/main"), reference_images("main")
    model = create_model("resnet32", num_classes=100, num_experts=3)
    variables = as_double(reference_variables(num_experts=3))
    one_hot = np.eye(100)
    targets = one_hot[case["labels"]]
    if mixup:
        share = case["lam"]
        images = share * images + (1 - share) * images[case["perm"]]
        targets = share * targets + (1 - share) * one_hot[case["labels_b"]]
    prior = jnp.log(case["class_counts"] / case["class_counts"].sum() + 1e-9)

    @jax.jit
    @jax.value_and_grad
    def loss_fn(params):
        outputs, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return balpoe_loss(outputs.logits, jnp.asarray(targets), prior, case["taus"]).mean()

    loss, grads = loss_fn(variables["params"])
    prefix = "mixup_" if mixup else ""
    np.testing.assert_allclose(loss, case[f"{prefix}loss_f64"], rtol=1e-9)
    norm = optax.tree.norm(grads)
    np.testing.assert_allclose(norm, case[f"{prefix}grad_global_norm_f64"], rtol=1e-7)
    by_name = to_reference(grads)
    stored = golden(f"resnet32/main/{prefix}grad_f64")  # the norm, then the first 16 entries
    assert len(stored) == (1 if mixup else 16)
    for name, expected in stored.items():
        flat = by_name[name].ravel()
        np.testing.assert_allclose(np.linalg.norm(flat), expected[0], rtol=1e-7, err_msg=name)
        scale = np.abs(expected[1:]).max()
        np.testing.assert_allclose(flat[:16], expected[1:], atol=1e-7 * scale, err_msg=name)


@pytest.mark.integration
def test_running_statistics_are_the_references() -> None:
    """But for the factor n / (n - 1), since PyTorch averages unbiased variances."""
    images = reference_images("main").astype(np.float32)
    model = create_model("resnet32", num_classes=100, num_experts=3)
    variables = reference_variables(num_experts=3)
    _, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    old = to_reference(variables["batch_stats"])
    new = unbiased_statistics(old, to_reference(updated["batch_stats"]), images.shape)
    for name, expected in golden("resnet32/main/running").items():
        assert max_relative(new[name], expected) < 5e-5, name


@pytest.mark.integration
@pytest.mark.slow_cases("resnet44-3", "resnet56-3")
@pytest.mark.parametrize(
    ("name", "num_experts"),
    [
        *((name, 3) for name in CIFAR_MODELS),
        *(("resnet8", number) for number in (1, 2, 4, 5, 6, 7)),
    ],
)
def test_shapes(name: str, num_experts: int) -> None:
    model = create_model(name, num_classes=10, num_experts=num_experts)

    def run(key):
        variables = model.init(key, jnp.zeros((1, 16, 16, 3)), train=False)
        return variables, model.apply(variables, jnp.zeros((2, 16, 16, 3)), train=False)

    variables, outputs = jax.eval_shape(run, jax.random.key(0))
    assert outputs.logits.shape == (num_experts, 2, 10)
    assert outputs.features.shape == (num_experts, 2, 128 if name.endswith("bbn") else 64)
    assert all(x.shape[0] == num_experts for x in jax.tree.leaves(variables["params"]["expert"]))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"expert_map": "vmap"}, {"remat": True}])
def test_expert_map_and_rematerialisation_give_one_model(options: dict) -> None:
    """The same variables from a seed, and the same function and statistics of them."""
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    results = []
    for changes in ({}, options):
        model = create_model("resnet8", num_classes=5, num_experts=3, **changes)
        variables = init(model, images)
        apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
        outputs, updated = apply(variables, images)
        results.append((variables, outputs, updated))
    (variables, outputs, updated), (other_variables, other_outputs, other_updated) = results
    chex.assert_trees_all_equal(variables, other_variables)
    chex.assert_trees_all_close(outputs, other_outputs, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(updated, other_updated, rtol=1e-4, atol=1e-5)


# Of ResNet-8: the stem, three stages of one block, the linear classifier of ten classes.
PARTS = (27 * 16 + 32, 2 * 9 * 16**2 + 64, 9 * 16 * 32 + 9 * 32**2 + 128, 9 * 32 * 64 + 9 * 64**2)
PARTS = (*PARTS[:3], PARTS[3] + 256, 64 * 10 + 10)


@pytest.mark.parametrize("shared", [None, -1, 0, 1, 2, 3])
def test_experts_share_as_much_as_they_are_asked_to(shared: int | None) -> None:
    """By the number of parameters."""
    model = create_model(
        "resnet8", num_classes=10, num_experts=3, classifier="linear", shared_stages=shared
    )
    variables = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 8, 8, 3)), train=False), jax.random.key(0)
    )
    cut = 1 + (1 if shared is None else shared)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert parameters == sum(PARTS[:cut]) + 3 * sum(PARTS[cut:])


@pytest.mark.parametrize("options", [{}, {"shared_stages": -1}, {"reduce_dimension": True}])
def test_a_width_multiplies_the_channels_of_all_layers(options: dict) -> None:
    """The stem's too, whoever has it; not the image's, nor the classes."""

    def shapes(width: int) -> dict:
        model = create_model("resnet8", num_classes=10, num_experts=2, width=width, **options)
        images = jnp.zeros((1, 8, 8, 3))
        return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))

    def multiplied(path, leaf) -> jax.ShapeDtypeStruct:
        kernel, head = path[-1].key == "kernel", "head" in jax.tree_util.keystr(path)
        axes = [-2] if head else [-2, -1] if kernel else [-1]
        shape = list(leaf.shape)
        for axis in axes:
            shape[axis] *= 1 if shape[axis] == 3 else 3
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    chex.assert_trees_all_equal_shapes(
        jax.tree_util.tree_map_with_path(multiplied, shapes(1)), shapes(3)
    )


@pytest.mark.parametrize(("name", "width"), [("resnet50", 2), ("resnet8", 0)])
def test_a_width_that_a_network_cannot_have_is_refused(name: str, width: int) -> None:
    with pytest.raises(
        UserError, match=f"width of at least 1, and of 1 for all but resnet8.* got {width}"
    ):
        create_model(name, num_classes=3, num_experts=1, width=width)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("shared", [-1, 3])
def test_one_expert_is_one_network_however_it_is_cut(shared: int) -> None:
    """With the same weights: one function, and the same statistics after it."""
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    whole, cut = (
        create_model("resnet8", num_classes=5, num_experts=1, shared_stages=shared)
        for shared in (None, shared)
    )
    variables = init(whole, images)

    def moved(part: dict) -> dict:
        """All layers to the expert, or all to the trunk."""
        trunk, expert = part["trunk"], part["expert"]
        if shared == -1:
            stacked = jax.tree.map(lambda x: x[None], trunk)
            return {"expert": {**expert, "body": {**expert["body"], **stacked}}}
        own = jax.tree.map(lambda x: x[0], expert["body"])
        rest = {"expert": {"head": expert["head"]}} if "head" in expert else {}
        return {"trunk": {**trunk, **own}, **rest}

    same = {name: moved(part) for name, part in variables.items()}
    chex.assert_trees_all_equal_shapes(same, dict(init(cut, images)))
    expected, stats = whole.apply(variables, images, train=True, mutable=["batch_stats"])
    found, new_stats = cut.apply(same, images, train=True, mutable=["batch_stats"])
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(
        dict(new_stats), {name: moved(part) for name, part in stats.items()}, rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_bbns_network_ends_in_two_last_blocks_of_another_network() -> None:
    """ResNet-14's last stage has one block more than two: either of them is its last one."""
    options = {"num_classes": 10, "num_experts": 1, "classifier": "linear"}
    branched = create_model("resnet32_bbn", stage_sizes=(1, 1, 1), **options)
    plain = create_model("resnet20", stage_sizes=(1, 1, 2), **options)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables, like = init(branched, images), init(plain, images)
    outputs = jax.jit(partial(branched.apply, train=False))(variables, images)
    assert outputs.features.shape == (1, 4, 128) and outputs.logits.shape == (1, 4, 10)
    for branch, half in ((1, slice(64)), (2, slice(64, None))):
        moved = {}
        for kind in ("params", "batch_stats"):
            body = dict(variables[kind]["expert"]["body"])
            last = body.pop(f"branch{branch}")["block0"]
            body.pop(f"branch{3 - branch}")
            body["layer3"] = {**body["layer3"], "block1": last}
            expert = {**like[kind].get("expert", {}), "body": body}
            moved[kind] = {**variables[kind], "expert": expert}
        expected = jax.jit(partial(plain.apply, train=False))(moved, images).features
        np.testing.assert_allclose(outputs.features[..., half], expected, rtol=1e-5, atol=1e-6)
    sizes = [
        sum(x.size for x in jax.tree.leaves(jax.eval_shape(partial(init, model), images)["params"]))
        for model in (
            create_model("resnet32_bbn", **options),
            create_model("resnet32", **options),
        )
    ]
    block = 2 * (9 * 64 * 64 + 2 * 64)
    assert sizes[0] - sizes[1] == block + 64 * 10


@pytest.mark.integration
def test_a_cosine_head_may_have_a_bias() -> None:
    model = create_model(
        "resnet8", num_classes=5, num_experts=2, scale=16.0, classifier="cosine_bias"
    )
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    variables = init(model, images)
    bias = variables["params"]["expert"]["head"]["bias"]
    assert bias.shape == (2, 5) and not bias.any()
    logits = model.apply(variables, images, train=False).logits
    variables["params"]["expert"]["head"]["bias"] = bias + 1
    moved = model.apply(variables, images, train=False).logits
    np.testing.assert_allclose(moved, logits + 1, rtol=1e-6)


def test_experts_start_different_and_the_trunk_is_shared() -> None:
    model = create_model("resnet8", num_classes=5, num_experts=3)
    images = jnp.ones((2, 8, 8, 3))
    variables = init(model, images)
    kernel = variables["params"]["expert"]["body"]["layer2"]["block0"]["conv1"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    assert variables["params"]["trunk"]["conv1"]["kernel"].shape == (3, 3, 3, 16)


@pytest.mark.integration
def test_initial_values_have_the_references_distributions() -> None:
    model = create_model("resnet8", num_classes=100, num_experts=3)
    variables = init(model, jnp.zeros((1, 8, 8, 3)))
    kernel = variables["params"]["expert"]["body"]["layer3"]["block0"]["conv2"]["kernel"]
    # He's normal with fan-in 3 * 3 * 64; the standard error of the estimate is 0.2% here.
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / 576), rtol=0.01)
    head = variables["params"]["expert"]["head"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(head, axis=1), np.ones((3, 100)), rtol=1e-5)


@pytest.mark.integration
def test_the_cosine_head_ignores_lengths_and_is_bounded_by_its_scale() -> None:
    model = create_model("resnet8", num_classes=5, num_experts=2, scale=7.0)
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    variables = init(model, images, seed=1)
    logits = model.apply(variables, images, train=False).logits
    assert np.abs(logits).max() <= 7.0 * (1 + 1e-6)
    longer = jax.tree.map(lambda x: x, variables)
    longer["params"]["expert"]["head"]["kernel"] = (
        3 * variables["params"]["expert"]["head"]["kernel"]
    )
    chex.assert_trees_all_close(
        model.apply(longer, images, train=False).logits, logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.integration
def test_a_feature_of_zero_has_a_finite_gradient() -> None:
    model = create_model("resnet8", num_classes=5, num_experts=1)
    images = jnp.zeros((2, 8, 8, 3))
    variables = init(model, images, seed=1)
    gradient = jax.grad(
        lambda params: model.apply(
            {**variables, "params": params}, images, train=False
        ).logits.sum()
    )
    grads = jax.jit(gradient)(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet9"}, "Unknown model 'resnet9'; choose from resnet8"),
        (
            {"classifier": "mlp"},
            "Unknown classifier 'mlp'; choose from cosine, linear, cosine_bias",
        ),
        ({"expert_map": "pmap"}, "Unknown expert_map 'pmap'"),
        ({"num_experts": 0}, "num_experts >= 1"),
        ({"stage_sizes": (1, 1)}, "stage_sizes of resnet8 must be three numbers"),
        ({"stage_sizes": (1, 0, 1)}, "three numbers of at least 1"),
        ({"shared_stages": -2}, r"shared_stages of resnet8 must be from -1 .* to 3, got -2"),
        ({"shared_stages": 4}, "shared_stages of resnet8 must be"),
        ({"name": "resnet50", "stage_sizes": (1, 1, 1)}, "stage_sizes of resnet50 must be four"),
    ],
)
def test_refuses_what_it_does_not_know(changes: dict, message: str) -> None:
    options = {"name": "resnet8", "num_classes": 10, "num_experts": 3, **changes}
    with pytest.raises(UserError, match=message):
        create_model(**options)
