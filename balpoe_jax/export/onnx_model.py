# SPDX-License-Identifier: Apache-2.0
"""ONNX, which ONNX Runtime and many other programs run.

session = onnxruntime.InferenceSession("model.onnx")
found = session.run(["probabilities"], {"images": images})
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.errors import UserError
from balpoe_jax.export.onnx_graph import NUMBER, OPSET, Graph, Tensor, Value, is_number, trace
from balpoe_jax.files import reports_write_errors
from balpoe_jax.predictor import Predictor

FILE = "model.onnx"

# The version of the format that goes with the operations.
_IR_VERSION = 8


def write(predictor: Predictor, folder: Path) -> Path:
    """Writes the program with its weights.

    Args:
        predictor: Restored run.
        folder: Folder of the file.

    Raises:
        UserError (a `ValueError`): the package onnx is not installed, a network with an operation
            that is not supported, or a file that cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(
            "Exporting to ONNX needs the package onnx, which is not installed; install it with "
            "pip install 'balpoe_jax[onnx]'."
        ) from error
    model = convert(predictor)
    path = folder / FILE
    with reports_write_errors(path):
        onnx.save(model, str(path))
    return path


def convert(predictor: Predictor) -> Any:
    """The model, as the package onnx has it.

    Args:
        predictor: Restored run.

    Raises:
        UserError (a `ValueError`): a network with an operation that is not supported.
    """
    import onnx
    from onnx import helper, numpy_helper

    side = predictor.image_size
    shape = (NUMBER, side, side, 3)
    closed, outputs = jax.make_jaxpr(predictor.as_function(), return_shape=True)(
        jax.ShapeDtypeStruct(shape, jnp.uint8)
    )
    graph = Graph()
    found = trace(graph, closed, Tensor("images", shape, shape, np.dtype(np.uint8)))
    names = sorted(outputs)  # as trees of JAX are
    named = [_named(graph, name, value) for name, value in zip(names, found, strict=True)]
    body = helper.make_graph(
        [*graph.nodes, *(node for node, _ in named)],
        "balpoe_jax",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", side, side, 3])],
        [info for _, info in named],
        [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
    )
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION
    )
    onnx.checker.check_model(model)
    return model


def _named(graph: Graph, name: str, value: Value) -> tuple[Any, Any]:
    """The node that gives an output its name, and its type."""
    import onnx
    from onnx import helper

    assert isinstance(value, Tensor)
    shape = ["n" if is_number(length) else length for length in value.shape]
    info = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    return helper.make_node("Identity", [value.name], [name]), info
