# SPDX-License-Identifier: Apache-2.0
"""A graph of ONNX from the equations of a traced JAX function.

What depends on weights alone is computed while the graph is built, so that few operations of JAX
have to be known: those that networks apply to images. Images keep their layout NHWC; convolutions
and pooling are transposed around. A broadcast stays undone as long as ONNX broadcasts by itself.
bfloat16 becomes float32.

The function is traced for `NUMBER` images, a prime that no other dimension is a multiple of. A
dimension that is one stands for the number of images, or a multiple of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.extend import core

from balpoe_jax.errors import UserError

OPSET = 17
NUMBER = 7919

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value of the graph.

    Attributes:
        name: Name in the graph.
        shape: Shape that JAX says it has.
        actual: Shape that it has in the graph: 1 where a broadcast is still to be done.
        dtype: Type in the graph.
    """

    name: str
    shape: Shape
    actual: Shape
    dtype: np.dtype


Value = Tensor | npt.NDArray[Any]


class Graph:
    """Nodes and constants, as they are added.

    Attributes:
        nodes: Nodes of ONNX, in order.
        constants: Arrays by name.
    """

    def __init__(self) -> None:
        import onnx  # an extra

        self._onnx = onnx
        self.nodes: list[Any] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self._count = 0

    def add(
        self, kind: str, inputs: Sequence[Value], shape: Shape, dtype: Any, **attributes: Any
    ) -> Tensor:
        """Adds a node with one output.

        Args:
            kind: Name of the operation in ONNX.
            inputs: Inputs; arrays become constants.
            shape: Shape of the output.
            dtype: Type of the output.
            attributes: Attributes of the node.
        """
        (found,) = self.add_several(kind, inputs, [(shape, dtype)], **attributes)
        return found

    def add_several(
        self,
        kind: str,
        inputs: Sequence[Value],
        outputs: Sequence[tuple[Shape, Any]],
        **attributes: Any,
    ) -> list[Tensor]:
        """Adds a node with several outputs.

        Args:
            kind: Name of the operation in ONNX.
            inputs: Inputs; arrays become constants.
            outputs: Shape and type of each output.
            attributes: Attributes of the node.
        """
        found = []
        for shape, dtype in outputs:
            self._count += 1
            whole = tuple(shape)
            found.append(Tensor(f"v{self._count}", whole, whole, np.dtype(dtype)))
        names = [self._named(value) for value in inputs]
        outs = [tensor.name for tensor in found]
        self.nodes.append(self._onnx.helper.make_node(kind, names, outs, **attributes))
        return found

    def _named(self, value: Value) -> str:
        if isinstance(value, Tensor):
            return value.name
        array = np.asarray(value)
        if array.dtype not in (np.int64, np.bool_, np.uint8, np.int32):
            array = array.astype(np.float32)
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name

    def integers(self, values: Sequence[int]) -> npt.NDArray[np.int64]:
        """A constant of whole numbers, such as a shape."""
        return np.asarray(values, np.int64)

    def done(self, value: Value) -> Value:
        """The value with its broadcast done."""
        if not isinstance(value, Tensor) or value.actual == value.shape:
            return value
        pairs = list(zip(value.actual, value.shape, strict=True))
        if any(is_number(full) and actual == 1 for actual, full in pairs):
            raise UserError(
                "This network repeats a value for each image in a way that --format=onnx does not "
                "support; choose --format=stablehlo or savedmodel."
            )
        target = [full if actual != full else 1 for actual, full in pairs]
        shape = self.integers(target)
        return self.add("Expand", [value, shape], value.shape, value.dtype)


def is_number(length: int) -> bool:
    """Whether a dimension stands for the number of images, or a multiple of it."""
    return length > 0 and length % NUMBER == 0


def trace(graph: Graph, closed: Any, images: Tensor) -> list[Value]:
    """Adds a traced function to a graph; returns its outputs.

    Args:
        graph: Graph.
        closed: What `jax.make_jaxpr` returned, of one argument.
        images: Input of the graph.

    Raises:
        UserError (a `ValueError`): an operation that is not known here.
    """
    outputs = _run(graph, closed.jaxpr, closed.consts, [images])
    return [graph.done(value) for value in outputs]


def _run(graph: Graph, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
    values: dict[Any, Value] = {}
    values.update(zip(jaxpr.constvars, map(_array, consts), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Any) -> Value:
        literal = isinstance(variable, core.Literal)
        return _array(variable.val) if literal else values[variable]

    for equation in jaxpr.eqns:
        given = [read(variable) for variable in equation.invars]
        found = _apply(graph, equation, given)
        values.update(zip(equation.outvars, found, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _array(value: Any) -> npt.NDArray[Any]:
    return np.asarray(jax.device_get(value))


def _apply(graph: Graph, equation: Any, given: Sequence[Value]) -> list[Value]:
    name, parameters = equation.primitive.name, equation.params
    inner = _inner(name, parameters)
    if inner is not None:
        return _run(graph, inner.jaxpr, inner.consts, given)
    if name == "scan":
        return _unrolled(graph, equation, given)
    if not any(isinstance(value, Tensor) for value in given) and _is_known(equation):
        found = equation.primitive.bind(*given, **parameters)
        return [_array(x) for x in (found if equation.primitive.multiple_results else [found])]
    from balpoe_jax.export import onnx_operations

    rule = onnx_operations.RULES.get(name)
    if rule is None:
        raise UserError(
            f"--format=onnx does not support this network: it has JAX's operation {name}; choose "
            "--format=stablehlo or savedmodel."
        )
    found = rule(graph, equation, given)
    return found if isinstance(found, list) else [found]


def _is_known(equation: Any) -> bool:
    """Whether no dimension is the number of images."""
    shapes = [variable.aval.shape for variable in equation.outvars]
    return not any(is_number(length) for shape in shapes for length in shape)


def _inner(name: str, parameters: dict[str, Any]) -> Any:
    """The function that an equation calls; None for an operation."""
    keys = {
        "jit": "jaxpr",
        "pjit": "jaxpr",
        "closed_call": "call_jaxpr",
        "core_call": "call_jaxpr",
        "remat": "jaxpr",
        "checkpoint": "jaxpr",
        "custom_jvp_call": "call_jaxpr",
        "custom_vjp_call": "call_jaxpr",
    }
    if name not in keys:
        return None
    return _closed(parameters[keys[name]])


def _closed(inner: Any) -> Any:
    return inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())


def _unrolled(graph: Graph, equation: Any, given: Sequence[Value]) -> list[Value]:
    """A scan, such as that over the experts, step by step."""
    parameters, body = equation.params, _closed(equation.params["jaxpr"])
    # JAX's versions say in different ways which variables are carried. These and the constants have
    # the same shape inside, and those of the steps have a dimension less.
    carried = _whole(equation.outvars, body.jaxpr.outvars)
    consts = _whole(equation.invars, body.jaxpr.invars) - carried
    fixed, carry = list(given[:consts]), list(given[consts : consts + carried])
    steps = given[consts + carried :]
    order = range(parameters["length"])
    rows: list[list[Value]] = []
    for i in reversed(order) if parameters["reverse"] else order:
        inputs = [*fixed, *carry, *(_row(graph, value, i) for value in steps)]
        found = _run(graph, body.jaxpr, body.consts, inputs)
        carry = found[:carried]
        rows.append(found[carried:])
    if parameters["reverse"]:
        rows.reverse()
    return [*carry, *(_stacked(graph, column) for column in zip(*rows, strict=True))]


def _whole(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """The number of variables that have as many dimensions inside a scan as outside."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(outer.aval.shape) == len(inner.aval.shape) for outer, inner in pairs)


def _row(graph: Graph, value: Value, i: int) -> Value:
    if not isinstance(value, Tensor):
        return np.asarray(value)[i]
    value, first = graph.done(value), graph.integers([0])
    assert isinstance(value, Tensor)
    ends = graph.integers([i]), graph.integers([i + 1])
    cut = graph.add("Slice", [value, *ends, first], (1, *value.shape[1:]), value.dtype)
    return graph.add("Squeeze", [cut, first], value.shape[1:], value.dtype)


def _stacked(graph: Graph, values: Sequence[Value]) -> Value:
    if not any(isinstance(value, Tensor) for value in values):
        return np.stack([np.asarray(value) for value in values])
    tensors = [graph.done(value) for value in values]
    (first, *_) = (value for value in tensors if isinstance(value, Tensor))
    whole = (1, *first.shape)
    apart = [
        graph.add("Unsqueeze", [value, graph.integers([0])], whole, first.dtype)
        for value in tensors
    ]
    return graph.add("Concat", apart, (len(values), *first.shape), first.dtype, axis=0)


Rule = Callable[[Graph, Any, Sequence[Value]], Value | list[Value]]
