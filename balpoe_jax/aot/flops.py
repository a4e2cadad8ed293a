# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations that a function's convolutions and matrix products need."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Counts a multiply-add as two, over all convolutions and matrix products; the rest is free.

    It follows the convention of the literature. A position of a kernel that lies on padding counts;
    a zero that a stride inserts in the gradient of its input does not. So each of a layer's two
    gradients counts as much as the layer. The compiler counts a little less (without the padding)
    or more (with additions and the like).

    Args:
        function: Function of JAX; if it is mapped over devices, the part of one device counts.
        *arguments: Arrays or `jax.ShapeDtypeStruct`; nothing is computed.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        left, right = (variable.aval.shape for variable in equation.invars)
        out = math.prod(equation.outvars[0].aval.shape)
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            return 2 * out * math.prod(left[axis] for axis in contracted)
        _, inputs, *window = parameters["dimension_numbers"].rhs_spec
        products = right[inputs] * math.prod(right[axis] for axis in window)
        return 2 * out * products // math.prod(parameters["lhs_dilation"])
    inside: list[int] = [_count(inner) for inner in _inner(parameters)]
    if name == "cond":
        return max(inside)
    if name == "while" and any(inside):
        raise ValueError("Cannot count the products in a loop of unknown length.")
    return sum(inside) * (parameters["length"] if name == "scan" else 1)


def _inner(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
