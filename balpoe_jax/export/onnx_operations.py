# SPDX-License-Identifier: Apache-2.0
"""The operations of JAX that networks apply to images, as nodes of ONNX."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from balpoe_jax.errors import UserError
from balpoe_jax.export.onnx_graph import Graph, Rule, Shape, Tensor, Value, is_number

_BINARY = {
    "add": "Add",
    "add_any": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "max": "Max",
    "min": "Min",
    "pow": "Pow",
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "and": "And",
    "or": "Or",
}
_UNARY = {
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "logistic": "Sigmoid",
    "neg": "Neg",
    "abs": "Abs",
    "erf": "Erf",
    "floor": "Floor",
    "not": "Not",
}
_REDUCTIONS = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd"}
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def _dtype(equation: Any) -> np.dtype:
    dtype = equation.outvars[0].aval.dtype
    return np.dtype(np.float32) if dtype == "bfloat16" else np.dtype(dtype)


def _shape(equation: Any) -> Shape:
    return tuple(equation.outvars[0].aval.shape)


def _actual(value: Value) -> Shape:
    return value.actual if isinstance(value, Tensor) else tuple(np.shape(value))


def _together(given: Sequence[Value]) -> Shape:
    """The shape to which ONNX broadcasts values of one rank, and single numbers."""
    shapes = [_actual(value) for value in given if _actual(value)]
    return tuple(next((n for n in lengths if n != 1), 1) for lengths in zip(*shapes, strict=True))


def _lazy(found: Tensor, shape: Shape, actual: Shape) -> Tensor:
    return Tensor(found.name, shape, actual, found.dtype)


def _binary(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    found = graph.add(_BINARY[equation.primitive.name], given, (), _dtype(equation))
    return _lazy(found, _shape(equation), _together(given))


def _unary(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    found = graph.add(_UNARY[equation.primitive.name], given, (), _dtype(equation))
    return _lazy(found, _shape(equation), _actual(given[0]))


def _identity(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    return given[0]


def _rsqrt(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    root = graph.add("Sqrt", given, (), _dtype(equation))
    found = graph.add("Reciprocal", [root], (), _dtype(equation))
    return _lazy(found, _shape(equation), _actual(given[0]))


def _square(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    found = graph.add("Mul", [given[0], given[0]], (), _dtype(equation))
    return _lazy(found, _shape(equation), _actual(given[0]))


def _erfc(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    found = graph.add("Erf", given, (), _dtype(equation))
    rest = graph.add("Sub", [np.array(1, np.float32), found], (), _dtype(equation))
    return _lazy(rest, _shape(equation), _actual(given[0]))


def _integer_pow(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    exponent = np.array(equation.params["y"], np.float32)
    found = graph.add("Pow", [given[0], exponent], (), _dtype(equation))
    return _lazy(found, _shape(equation), _actual(given[0]))


def _cast(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    import onnx

    dtype = _dtype(equation)
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    found = graph.add("Cast", given, (), dtype, to=kind)
    return _lazy(found, _shape(equation), _actual(given[0]))


def _select(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    which, *cases = given
    if len(cases) != 2:
        raise UserError("--format=onnx supports a choice of two values only.")
    found = graph.add("Where", [which, cases[1], cases[0]], (), _dtype(equation))
    return _lazy(found, _shape(equation), _together(given))


def _reshape_to(graph: Graph, value: Value, shape: Shape, dtype: Any) -> Tensor:
    """A reshape in which one dimension may be the number of images: it is what is left."""
    if sum(map(is_number, shape)) > 1:
        raise UserError("--format=onnx supports one number of images only.")
    target = [-1 if is_number(length) else length for length in shape]
    return graph.add("Reshape", [value, graph.integers(target)], shape, dtype)


def _reshape(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    return _reshape_to(graph, graph.done(given[0]), _shape(equation), _dtype(equation))


def _broadcast(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    shape, dtype, value = _shape(equation), _dtype(equation), given[0]
    actual = [1] * len(shape)
    for place, length in zip(equation.params["broadcast_dimensions"], _actual(value), strict=True):
        actual[place] = length
    if not isinstance(value, Tensor):
        # A constant for each image: one row of it, which ONNX broadcasts.
        name = graph.add("Identity", [np.asarray(value).reshape(actual)], shape, dtype)
        return _lazy(name, shape, tuple(actual))
    return _lazy(_reshape_to(graph, value, tuple(actual), dtype), shape, tuple(actual))


def _transpose(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    order = equation.params["permutation"]
    found = graph.add("Transpose", given, (), _dtype(equation), perm=list(order))
    actual = _actual(given[0])
    return _lazy(found, _shape(equation), tuple(actual[place] for place in order))


def _slice(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    parameters, shape = equation.params, _shape(equation)
    value = graph.done(given[0])
    whole = equation.invars[0].aval.shape
    starts, ends = parameters["start_indices"], parameters["limit_indices"]
    strides = parameters["strides"] or [1] * len(shape)
    cut = [
        i
        for i in range(len(shape))
        if not (starts[i] == 0 and strides[i] == 1 and ends[i] == whole[i])
    ]
    numbers = [graph.integers([values[i] for i in cut]) for values in (starts, ends)]
    rest = [graph.integers(cut), graph.integers([strides[i] for i in cut])]
    return graph.add("Slice", [value, *numbers, *rest], shape, _dtype(equation))


def _pad(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    value, fill = graph.done(given[0]), given[1]
    sides = equation.params["padding_config"]
    if any(low < 0 or high < 0 or inner for low, high, inner in sides):
        raise UserError("--format=onnx supports padding at the edges only.")
    pads = graph.integers([low for low, _, _ in sides] + [high for _, high, _ in sides])
    return graph.add("Pad", [value, pads, fill], _shape(equation), _dtype(equation))


def _concatenate(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    values = [graph.done(value) for value in given]
    axis = equation.params["dimension"]
    return graph.add("Concat", values, _shape(equation), _dtype(equation), axis=axis)


def _squeeze(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    value, axes = graph.done(given[0]), graph.integers(equation.params["dimensions"])
    return graph.add("Squeeze", [value, axes], _shape(equation), _dtype(equation))


def _reduce(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    value, axes = graph.done(given[0]), list(equation.params["axes"])
    shape, dtype = _shape(equation), _dtype(equation)
    if equation.primitive.name == "reduce_sum":
        return graph.add("ReduceSum", [value, graph.integers(axes)], shape, dtype, keepdims=0)
    kind = _REDUCTIONS[equation.primitive.name]
    return graph.add(kind, [value], shape, dtype, axes=axes, keepdims=0)


def _argmax(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    (axis,) = equation.params["axes"]
    value, shape = graph.done(given[0]), _shape(equation)
    found = graph.add("ArgMax", [value], shape, np.int64, axis=axis, keepdims=0)
    return _cast(graph, equation, [found])


def _cumsum(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    axis, reverse = np.array(equation.params["axis"], np.int64), int(equation.params["reverse"])
    value, shape = graph.done(given[0]), _shape(equation)
    return graph.add("CumSum", [value, axis], shape, _dtype(equation), reverse=reverse)


def _cumprod(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    """ONNX has sums only: products of slices, one after the other."""
    axis, shape, dtype = equation.params["axis"], _shape(equation), _dtype(equation)
    value, part = graph.done(given[0]), (*shape[:axis], 1, *shape[axis + 1 :])
    ends = [graph.integers([i]) for i in range(shape[axis] + 1)]
    where = graph.integers([axis])
    parts = [
        graph.add("Slice", [value, start, end, where], part, dtype)
        for start, end in itertools.pairwise(ends)
    ]
    order = parts[::-1] if equation.params["reverse"] else parts
    found = list(itertools.accumulate(order, lambda a, b: graph.add("Mul", [a, b], part, dtype)))
    whole = found[::-1] if equation.params["reverse"] else found
    return graph.add("Concat", whole, shape, dtype, axis=axis)


def _stack(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    axis, shape, dtype = equation.params["axis"], _shape(equation), _dtype(equation)
    part = (*shape[:axis], 1, *shape[axis + 1 :])
    where = graph.integers([axis])
    parts = [graph.add("Unsqueeze", [graph.done(x), where], part, dtype) for x in given]
    return graph.add("Concat", parts, shape, dtype, axis=axis)


def _top_k(graph: Graph, equation: Any, given: Sequence[Value]) -> list[Value]:
    axis, number = equation.params["axis"], graph.integers([equation.params["k"]])
    shape = _shape(equation)
    outputs = [(shape, _dtype(equation)), (shape, np.int64)]
    values, places = graph.add_several("TopK", [graph.done(given[0]), number], outputs, axis=axis)
    return [values, places]


def _nchw(graph: Graph, value: Value) -> Tensor:
    value = graph.done(value)
    assert isinstance(value, Tensor)
    shape = tuple(value.shape[place] for place in _TO_NCHW)
    return graph.add("Transpose", [value], shape, value.dtype, perm=list(_TO_NCHW))


def _convolution(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    parameters, (images, kernel) = equation.params, given
    layout = parameters["dimension_numbers"]
    is_usual = layout.lhs_spec == _TO_NCHW and layout.out_spec == _TO_NCHW
    if not is_usual or isinstance(kernel, Tensor) or parameters["batch_group_count"] != 1:
        raise UserError("--format=onnx supports convolutions of images with weights only.")
    if any(length != 1 for length in parameters["lhs_dilation"]):
        raise UserError("--format=onnx does not support transposed convolutions.")
    weights = np.transpose(np.asarray(kernel, np.float32), layout.rhs_spec)
    pads = parameters["padding"]
    found = graph.add(
        "Conv",
        [_nchw(graph, images), weights],
        (),
        np.float32,
        strides=list(parameters["window_strides"]),
        pads=[low for low, _ in pads] + [high for _, high in pads],
        dilations=list(parameters["rhs_dilation"]),
        group=parameters["feature_group_count"],
        kernel_shape=list(weights.shape[2:]),
    )
    return graph.add("Transpose", [found], _shape(equation), np.float32, perm=list(_TO_NHWC))


def _pool(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    parameters = equation.params
    window, strides = parameters["window_dimensions"], parameters["window_strides"]
    pads, is_sum = parameters["padding"], equation.primitive.name == "reduce_window_sum"
    dilated = any(n != 1 for n in (*parameters["base_dilation"], *parameters["window_dilation"]))
    if len(window) != 4 or (window[0], window[3]) != (1, 1) or dilated:
        raise UserError("--format=onnx supports pooling of images by height and width only.")
    options = {
        "kernel_shape": list(window[1:3]),
        "strides": list(strides[1:3]),
        "pads": [low for low, _ in pads[1:3]] + [high for _, high in pads[1:3]],
    }
    images = _nchw(graph, given[0])
    if is_sum:
        mean = graph.add("AveragePool", [images], (), np.float32, count_include_pad=1, **options)
        found = graph.add("Mul", [mean, np.array(math.prod(window), np.float32)], (), np.float32)
    else:
        found = graph.add("MaxPool", [images], (), np.float32, **options)
    return graph.add("Transpose", [found], _shape(equation), np.float32, perm=list(_TO_NHWC))


def _dot(graph: Graph, equation: Any, given: Sequence[Value]) -> Value:
    """A product of matrices: batch, free and contracted dimensions are brought in order."""
    (contracted, batch) = equation.params["dimension_numbers"]
    sides = []
    for value, own, shared, first in zip(given, contracted, batch, (True, False), strict=True):
        value = graph.done(value)
        shape = value.shape
        free = [i for i in range(len(shape)) if i not in (*own, *shared)]
        order = [*shared, *free, *own] if first else [*shared, *own, *free]
        parts = [[shape[i] for i in group] for group in (shared, free, own)]
        turned = graph.add(
            "Transpose", [value], tuple(shape[i] for i in order), np.float32, perm=order
        )
        leading, middle, inner = parts
        rows = [math.prod(middle), math.prod(inner)]
        flat = (
            *leading,
            *(rows if first else reversed(rows)),
        )
        sides.append(_reshape_to(graph, turned, flat, np.float32))
    product = graph.add("MatMul", sides, (*sides[0].shape[:-1], sides[1].shape[-1]), np.float32)
    return _reshape_to(graph, product, _shape(equation), np.float32)


RULES: dict[str, Rule] = {
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys((*_REDUCTIONS, "reduce_sum"), _reduce),
    **dict.fromkeys(("stop_gradient", "copy", "copy_p", "optimization_barrier"), _identity),
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum"), _pool),
    "argmax": _argmax,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "cumprod": _cumprod,
    "cumsum": _cumsum,
    "dot_general": _dot,
    "erfc": _erfc,
    "integer_pow": _integer_pow,
    "pad": _pad,
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "square": _square,
    "stack": _stack,
    "squeeze": _squeeze,
    "top_k": _top_k,
    "transpose": _transpose,
}
