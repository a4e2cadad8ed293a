# SPDX-License-Identifier: Apache-2.0
"""Division of whole numbers without the long one, bit by bit, of accelerators."""

import jax
import jax.numpy as jnp


def divide(dividend: jax.Array, divisor: jax.Array | int) -> jax.Array:
    """The quotient of int32 that are not negative, rounded down; below 2**20."""
    reciprocal = 1 / jnp.asarray(divisor, jnp.float32)
    quotient = (dividend.astype(jnp.float32) * reciprocal).astype(jnp.int32)
    # Of a quotient this small float32 misses by one at most.
    rest = dividend - quotient * divisor
    return quotient + (rest >= divisor).astype(jnp.int32) - (rest < 0).astype(jnp.int32)
