# SPDX-License-Identifier: Apache-2.0
"""Each operation of ONNX's graphs against JAX, for any number of rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.errors import UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from balpoe_jax.export.onnx_graph import NUMBER, OPSET, Graph, Tensor, trace  # noqa: E402

KERNEL = np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


def run(function: Callable[[Any], Any], rows: np.ndarray) -> np.ndarray:
    """The function's first output by ONNX Runtime, traced for no number of rows in particular."""
    shape = (NUMBER, *rows.shape[1:])
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32))
    graph = Graph()
    (found, *_) = trace(graph, closed, Tensor("x", shape, shape, np.dtype(np.float32)))
    assert isinstance(found, Tensor)
    kind = onnx.helper.np_dtype_to_tensor_dtype(found.dtype)
    body = onnx.helper.make_graph(
        graph.nodes,
        "test",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", *rows.shape[1:]])],
        [onnx.helper.make_tensor_value_info(found.name, kind, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
    )
    model = onnx.helper.make_model(
        body, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"x": rows})
    return result


def convolution(x: Any, **options: Any) -> Any:
    given = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), **options}
    return jax.lax.conv_general_dilated(
        x, KERNEL, dimension_numbers=("NHWC", "HWIO", "NHWC"), **given
    )


def pool(x: Any, initial: float, reduce: Any) -> Any:
    return jax.lax.reduce_window(x, initial, reduce, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


FUNCTIONS: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "arithmetic": (lambda x: (x + 2) * x / (x * x + 1) - jnp.maximum(x, 0.1), (5,)),
    "functions": (lambda x: jnp.exp(-jnp.abs(x)) + jnp.tanh(x) + jax.nn.sigmoid(x), (5,)),
    "roots": (lambda x: jnp.sqrt(jnp.square(x) + 1) + jax.lax.rsqrt(x * x + 2), (5,)),
    "powers": (lambda x: x**3 + jnp.power(jnp.abs(x) + 1, 0.5), (5,)),
    "logarithm": (lambda x: jnp.log1p(0.0) + jnp.log(jnp.abs(x) + 1), (5,)),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), (5,)),
    "choice": (lambda x: jnp.where((x > 0) & ~(x >= 1), x, -x), (5,)),
    "floor": (lambda x: jnp.floor(3 * x), (5,)),
    "softmax": (jax.nn.softmax, (5,)),
    "sums": (lambda x: x.sum(axis=1) + x.max(axis=1) - x.min(axis=1) * x.prod(axis=1), (5,)),
    "position of the largest": (lambda x: x.argmax(axis=1).astype(jnp.int32), (5,)),
    "largest ones": (lambda x: jax.lax.top_k(x, 2)[0], (5,)),
    "running sums": (lambda x: jnp.cumsum(x, axis=1), (5,)),
    "running sums from the end": (lambda x: jax.lax.cumsum(x, axis=1, reverse=True), (5,)),
    "running products": (lambda x: jnp.cumprod(x, axis=1), (5,)),
    "running products from the end": (lambda x: jax.lax.cumprod(x, axis=1, reverse=True), (5,)),
    "joined": (lambda x: jnp.concatenate([x[:, 1:4:2], x[:, :2]], axis=1), (5,)),
    "stacked": (lambda x: jnp.stack([x, 2 * x], axis=1), (5,)),
    "product": (lambda x: x @ WEIGHTS, (5,)),
    "product of batches": (lambda x: jnp.einsum("nij,nkj->nik", x, x), (2, 5)),
    "one row for all": (lambda x: jnp.concatenate([x, x * 0 + x[:, :1]], axis=1), (5,)),
    "turned": (lambda x: jnp.transpose(x, (0, 2, 1)).reshape(-1, 10), (2, 5)),
    "padded": (lambda x: jnp.pad(x, ((0, 0), (1, 2)), constant_values=0.5), (5,)),
    "without a dimension": (lambda x: jnp.squeeze(x[:, 1:2], axis=1), (5,)),
    "convolution": (lambda x: convolution(x), (7, 7, 2)),
    "strided convolution": (lambda x: convolution(x, window_strides=(2, 2)), (7, 7, 2)),
    "dilated convolution": (lambda x: convolution(x, rhs_dilation=(2, 2)), (7, 7, 2)),
    "grouped convolution": (
        lambda x: convolution(jnp.concatenate([x, -x], axis=3), feature_group_count=2),
        (7, 7, 2),
    ),
    "largest in windows": (lambda x: pool(x, -jnp.inf, jax.lax.max), (7, 7, 2)),
    "sums in windows": (lambda x: pool(x, 0.0, jax.lax.add), (7, 7, 2)),
    "loop over weights": (
        lambda x: jax.lax.scan(lambda c, w: (c + w, x * w), 0.0, jnp.arange(3.0))[1],
        (5,),
    ),
    "loop over rows of images": (
        lambda x: jax.lax.scan(
            lambda c, row: (c + row, c * row), x * 0, jnp.stack([x, 2 * x]), reverse=True
        )[1],
        (5,),
    ),
    "a call": (lambda x: jax.checkpoint(jnp.sin)(jnp.zeros(1))[None] + jax.jit(jnp.exp)(x), (5,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_is_jaxs(name: str) -> None:
    function, shape = FUNCTIONS[name]
    for number in (1, 3):
        rows = np.random.default_rng(number).normal(size=(number, *shape)).astype(np.float32)
        expected = np.asarray(function(rows))
        np.testing.assert_allclose(run(function, rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        (lambda x: jnp.sort(x, axis=1), (5,), "it has JAX's operation sort"),
        (lambda x: jax.lax.pad(x, 0.0, ((0, 0, 0), (-1, 0, 0))), (5,), "padding at the edges only"),
        (lambda x: convolution(x, lhs_dilation=(2, 2)), (7, 7, 2), "transposed convolutions"),
        (
            lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3), (1, 1), "SAME"),
            (5,),
            "pooling of images by height and width only",
        ),
        (
            lambda x: jax.lax.select_n(x.astype(jnp.int32), x, 2 * x, 3 * x),
            (5,),
            "a choice of two values only",
        ),
    ],
)
def test_what_is_not_supported_is_said(function, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(function, np.zeros((3, *shape), np.float32))
