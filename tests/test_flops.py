# SPDX-License-Identifier: Apache-2.0
"""Counted operations against counts by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from balpoe_jax.flops import count_flops
from balpoe_jax.models import create_model


def test_matrix_product_and_strided_grouped_convolution() -> None:
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))
    assert count_flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5 * 6
    images, kernel = jnp.zeros((2, 8, 8, 12)), jnp.zeros((3, 3, 4, 6))
    convolve = partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    once = 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)
    assert count_flops(convolve, images, kernel) == once
    # The gradients of both arguments are as much work as the convolution each.
    gradients = jax.grad(lambda x, w: convolve(x, w).sum(), argnums=(0, 1))
    assert count_flops(gradients, images, kernel) == 3 * once


def test_loops_branches_and_compiled_functions() -> None:
    x = jnp.zeros((4, 4))

    def function(x: jax.Array) -> jax.Array:
        y, _ = jax.lax.scan(lambda c, _: (jax.jit(jnp.matmul)(c, c), None), x, length=5)
        return jax.lax.cond(y[0, 0] > 0, lambda y: y @ y, lambda y: y, y)

    assert count_flops(function, x) == 6 * 2 * 4**3
    assert count_flops(jax.grad(lambda x: jax.checkpoint(function)(x).sum()), x) >= 18 * 2 * 4**3
    with pytest.raises(ValueError, match="unknown length"):
        count_flops(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x), x)


def test_what_no_output_depends_on_may_be_left_out() -> None:
    x = jnp.zeros((4, 4))

    def function(x: jax.Array) -> jax.Array:
        unused = jax.jit(jnp.matmul)(x, x) @ x
        return (x @ x, unused)[0]

    assert count_flops(function, x) == 3 * 2 * 4**3
    assert count_flops(function, x, only_used=True) == 2 * 4**3


def resnet8_by_hand(side: int, num_experts: int, num_classes: int) -> tuple[int, int]:
    """Multiply-adds of one image, and those of the first convolution among them."""
    first = side**2 * 9 * 3 * 16
    trunk = first + 2 * side**2 * 9 * 16 * 16
    layer2 = (side // 2) ** 2 * 9 * (16 * 32 + 32 * 32)
    layer3 = (side // 4) ** 2 * 9 * (32 * 64 + 64 * 64)
    return trunk + num_experts * (layer2 + layer3 + 64 * num_classes), first


@pytest.mark.parametrize("expert_map", ["loop", "vmap"])
def test_a_residual_network_forward_and_with_its_gradient(expert_map: str) -> None:
    model = create_model("resnet8", num_classes=7, num_experts=3, expert_map=expert_map)
    images = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    each, first = resnet8_by_hand(16, 3, 7)
    apply = partial(model.apply, train=False)
    assert count_flops(apply, variables, images) == 2 * 4 * each

    def loss(params: dict, variables: dict, images: jax.Array) -> jax.Array:
        return model.apply({**variables, "params": params}, images, train=False).logits.sum()

    counted = count_flops(jax.grad(loss), variables["params"], variables, images)
    assert counted == 2 * 4 * (3 * each - first)  # images need no gradient
