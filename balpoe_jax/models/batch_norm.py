# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation in few GPU kernels, with the parameters and the state of Flax's."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

_Pair = tuple[jax.Array, jax.Array]


class BatchNormInParts(nn.Module):
    """`flax.linen.BatchNorm` over all axes but the last, in another order of operations.

    On a GPU a sum over many rows takes two kernels: one adds up parts of the rows, one the parts.
    Two sums over the same rows share the first kernel; here they share the second one, too.

    Attributes:
        use_running_average: Whether to normalise by the running averages, which then stay the same.
        axis_name: Mapped axis over which the statistics are averaged, too; None for none.
        dtype: Type of the result; None for the one that follows from input and parameters.
        momentum: Share of the old running average. PyTorch's momentum of 0.1 is 0.9 here.
        epsilon: Constant that is added to the variance.
    """

    use_running_average: bool
    axis_name: str | None = None
    dtype: Any = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Float `[..., C]` -> the same shape; statistics are computed in float32 or wider."""
        shape = (x.shape[-1],)
        scale = self.param("scale", initializers.ones, shape)
        bias = self.param("bias", initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        dtype = self.dtype or jnp.result_type(x, scale, bias)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        count = _number_of_parts(x.size // x.shape[-1])
        parts = x.astype(wide).reshape(count, -1, x.shape[-1])
        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            axis_name = None if self.is_initializing() else self.axis_name
            mean, var = _statistics(parts, axis_name)
            if not self.is_initializing():
                for running, new in ((running_mean, mean), (running_var, var)):
                    running.value = self.momentum * running.value + (1 - self.momentum) * new
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        # The gradient of the mean flows through the shift, whose gradient is a sum that is needed
        # anyway.
        center = jax.lax.stop_gradient(mean)
        shift = bias + (center - mean) * factor
        factor, shift = _copy_to_parts((factor, shift), len(parts))
        return ((parts - center[None, None]) * factor + shift).reshape(x.shape).astype(dtype)


def _statistics(parts: jax.Array, axis_name: str | None) -> _Pair:
    """Mean and biased variance `[C]` of rows in parts `[P, R, C]`, over all devices of the axis."""
    # Divided before the parts are added up: afterwards the division would be another kernel.
    share = 1 / (parts.shape[0] * parts.shape[1])
    sums = _one_kernel((parts.sum(axis=1), jnp.square(parts).sum(axis=1)))
    means = (_join(sums) * share).sum(axis=1)
    if axis_name is not None:
        means = jax.lax.pmean(means, axis_name)
    mean, mean_of_squares = _cut(means)
    return mean, jnp.maximum(0.0, mean_of_squares - jnp.square(mean))  # rounding may go below 0


def _copy_to_parts(pair: _Pair, parts: int) -> _Pair:
    """Copies two `[C]` to `[P, 1, C]`, so that their gradients are summed part by part."""
    joined = _join(pair)[:, None, None]
    return _one_gradient_kernel(_cut(jnp.broadcast_to(joined, (2, parts, *joined.shape[2:]))))


def _join(pair: _Pair) -> jax.Array:
    """Two arrays as one with a leading axis of 2."""
    return jnp.concatenate([each[None] for each in pair])


def _cut(pair: jax.Array) -> _Pair:
    """The reverse of `_join`, written so that the compiler sees through its gradient."""
    first, second = jax.lax.split(pair, (1, 1))
    return first.reshape(first.shape[1:]), second.reshape(second.shape[1:])


@jax.custom_jvp
def _one_kernel(pair: _Pair) -> _Pair:
    """The pair, computed together: keeps the compiler from fusing one of it with later code."""
    return jax.lax.optimization_barrier(pair)


@_one_kernel.defjvp
def _one_kernel_jvp(primals: tuple[_Pair], tangents: tuple[_Pair]) -> tuple[_Pair, _Pair]:
    return _one_kernel(*primals), *tangents


@jax.custom_vjp
def _one_gradient_kernel(pair: _Pair) -> _Pair:
    """The pair, with gradients that are computed together."""
    return pair


_one_gradient_kernel.defvjp(
    lambda pair: (pair, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),)
)


def _number_of_parts(rows: int) -> int:
    """The largest power of two that divides the rows and is at most about their square root."""
    parts = 1
    while rows % (2 * parts) == 0 and 4 * parts**2 <= rows:
        parts *= 2
    return parts
