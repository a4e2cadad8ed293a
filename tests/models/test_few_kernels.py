# SPDX-License-Identifier: Apache-2.0
"""What saves kernels on GPUs changes no number but by rounding; here on CPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.methods import Context
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.models import create_model
from balpoe_jax.models.batch_norm import BatchNormInParts, _number_of_parts
from balpoe_jax.models.convolutions import conv_by_expert
from balpoe_jax.one_vector import cut, join, over_one_vector
from balpoe_jax.optim import make_optimizer
from balpoe_jax.parallel import AXIS_NAME, make_parallel
from balpoe_jax.step import create_state, make_train_step
from tests.helpers import tiny_network

X = np.random.default_rng(0).normal(3.0, 2.0, (8, 4, 6, 5))


def flax_norm(train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_is_flaxs_with_all_gradients(x64: None, train: bool) -> None:
    random = np.random.default_rng(1)
    variables = {
        "params": {"scale": random.normal(1, 0.1, 5), "bias": random.normal(0, 1, 5)},
        "batch_stats": {"mean": random.normal(0, 1, 5), "var": random.uniform(1, 2, 5)},
    }
    weights = random.normal(size=X.shape)

    def result(module: nn.Module, params, x):
        y, new = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(weights * jnp.tanh(y)), (y, new)

    found = [
        jax.value_and_grad(partial(result, module), (0, 1), has_aux=True)(variables["params"], X)
        for module in (BatchNormInParts(not train), flax_norm(train))
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), *found)


@pytest.mark.integration
def test_batch_norm_has_flaxs_variables() -> None:
    new, old = (
        module.init(jax.random.key(0), X.astype(np.float32))
        for module in (BatchNormInParts(False), flax_norm(True))
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), old
    )


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (7, 1), (64, 8), (192, 8), (2**17, 256)])
def test_parts_divide_the_rows(rows: int, parts: int) -> None:
    assert _number_of_parts(rows) == parts


@pytest.mark.parametrize("width", [4, 64])
@pytest.mark.parametrize("shared", [False, True])
def test_convolutions_one_by_one_are_the_mapped_ones(shared: bool, width: int) -> None:
    random = np.random.default_rng(2)
    images = random.normal(size=(2, 6, 6, width) if shared else (3, 2, 6, 6, width))
    kernels = random.normal(size=(3, 3, 3, width, width))
    axes = (None if shared else 0, 0)
    options = {"padding": ((1, 1), (1, 1)), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def total(convolve, images, kernels):
        mapped = jax.vmap(partial(convolve, window_strides=(2, 2), **options), axes)
        return jnp.sum(jnp.sin(mapped(images, kernels)))

    arguments = jnp.asarray(images, jnp.float32), jnp.asarray(kernels, jnp.float32) / width
    gradient = partial(jax.jit, static_argnums=0)(jax.value_and_grad(total, (1, 2)))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3),
        gradient(conv_by_expert, *arguments),
        gradient(jax.lax.conv_general_dilated, *arguments),
    )
    text = jax.jit(partial(total, conv_by_expert)).lower(*arguments).as_text()
    assert "feature_group_count = 1 " in text
    assert "feature_group_count = 3" not in text


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_stacked_experts_are_those_of_the_loop(remat: bool) -> None:
    images = np.random.default_rng(3).normal(size=(4, 8, 8, 3)).astype(np.float32)

    def make(expert_map: str, **options):
        return create_model(
            "resnet8",
            num_classes=5,
            num_experts=2,
            shared_stages=2,
            expert_map=expert_map,
            remat=remat,
            **options,
        )

    variables = make("loop").init(jax.random.key(0), images, train=False)

    def results(model):
        def total(params):
            outputs, new = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(outputs.logits**2), (outputs, new)

        return jax.jit(jax.grad(total, has_aux=True))(variables["params"])

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4),
        results(make("stacked", norm_in_parts=True)),
        results(make("loop")),
    )


def test_a_tree_is_cut_from_the_vector_that_it_was_joined_to() -> None:
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.int32(7), jnp.ones(2, jnp.bfloat16)]}
    vector = join(tree)
    assert (vector.shape, vector.dtype) == ((9,), jnp.float32)
    again = cut(vector, tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, tree)


@pytest.mark.parametrize("rate", [0.1, lambda step: 0.1 / (step + 1)])
def test_an_update_of_one_vector_is_that_of_the_tree(rate) -> None:
    random = np.random.default_rng(4)
    params = {"a": random.normal(size=(2, 3)), "b": {"c": random.normal(size=4), "d": 2.0}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    optimizers = [make_optimizer(rate, as_one_vector=flag) for flag in (False, True)]
    found = []
    for optimizer in optimizers:
        now, state = params, optimizer.init(params)
        for _ in range(3):
            updates, state = jax.jit(optimizer.update)(now, state, now)
            now = optax.apply_updates(now, updates)
        found.append((now, state))
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), *found)


@pytest.mark.integration
def test_any_elementwise_optimizer_keeps_its_state() -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.full(4, 2.0)}
    plain, vector = optax.adam(0.1), over_one_vector(optax.adam(0.1))
    (updates, state), expected = (
        each.update(params, each.init(params), params) for each in (vector, plain)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), (updates, state), expected)


@pytest.mark.integration
@pytest.mark.slow_cases("False")
@pytest.mark.parametrize("skip_non_finite", [False, True])
def test_a_step_of_one_vector_is_that_of_the_tree(skip_non_finite: bool) -> None:
    model = tiny_network.create_model(
        "",
        num_classes=5,
        num_experts=2,
        classifier="cosine",
        scale=30.0,
        dtype=None,
        axis_name=AXIS_NAME,
    )
    context = Context(np.array([9, 5, 3, 2, 1]), (0.0, 1.0), axis_name=AXIS_NAME)
    devices = make_parallel("shard_map", jax.devices()[:2])
    random = np.random.default_rng(5)
    batch = TrainBatch(
        views=(random.normal(size=(8, 8, 8, 3)).astype(np.float32),),
        labels=np.arange(8, dtype=np.int32) % 5,
        other_labels=np.zeros(8, np.int32),
        mix_weight=np.full(8, 0.7, np.float32),
    )
    bad = batch._replace(views=(np.full_like(batch.images, np.nan),))
    found = []
    for one in (False, True):
        optimizer = make_optimizer(0.1, as_one_vector=one)
        state = create_state(model, optimizer, jax.random.key(0), (8, 8, 3))
        step = devices.map_step(
            make_train_step(model, optimizer, BalPoE(), context, 0, 1, skip_non_finite, one)
        )
        state, first = step(devices.replicate(state), devices.shard(batch))
        found.append((first, *step(state, devices.shard(bad))))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *found)
    assert bool(found[1][0]["finite"])
    assert not bool(found[1][2]["finite"])
