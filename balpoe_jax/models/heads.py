# SPDX-License-Identifier: Apache-2.0
"""Classifiers on top of pooled features."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

# The last one is the cosine head with a bias.
CLASSIFIERS = ("cosine", "linear", "cosine_bias")

# Initialisers of a linear head: He's, and PyTorch's own, uniform in (-1, 1) / sqrt(D).
he_normal = initializers.variance_scaling(2.0, "fan_in", "normal")
torch_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
INITIALISERS = {"he": he_normal, "torch": torch_uniform}

# The norm below which the reference no longer divides.
_NORM_EPSILON = 1e-12


def unit_columns(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform in (-1, 1), each column then scaled to length 1; shape `[D, C]`."""
    weight = jax.random.uniform(key, shape, dtype, -1.0, 1.0)
    return normalize(weight, axis=0)


def normalize(x: jax.Array, axis: int) -> jax.Array:
    """`x / max(|x|, 1e-12)` along `axis`, with a finite gradient at 0."""
    squares = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, _NORM_EPSILON**2))


class CosineHead(nn.Module):
    """`scale * cos(features, weight_c)` for each class; the paper's classifier, without a bias.

    Computed in float32 (or wider, if the features are), whatever the body's precision.

    Attributes:
        num_classes: `C`.
        scale: of the cosines.
        use_bias: add one to each class, 0 at first, which is not scaled.
    """

    num_classes: int
    scale: float = 30.0
    use_bias: bool = False

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """float `[B, D]` -> `[B, C]`."""
        kernel = self.param("kernel", unit_columns, (features.shape[-1], self.num_classes))
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        # Accelerators multiply float32 in fewer bits by default; a logit is 30 times the product.
        cosines = jnp.matmul(
            normalize(features, axis=-1),
            normalize(kernel, axis=0),
            precision=jax.lax.Precision.HIGHEST,
        )
        logits = self.scale * cosines
        if self.use_bias:
            bias = self.param("bias", initializers.zeros, (self.num_classes,))
            logits = logits + bias[None]
        return logits


class LinearHead(nn.Module):
    """A linear layer with bias, which is initialised as in PyTorch."""

    num_classes: int
    kernel_init: initializers.Initializer = he_normal

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """float `[B, D]` -> `[B, C]`."""
        bound = features.shape[-1] ** -0.5

        def bias_init(
            key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
        ) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return nn.Dense(
            self.num_classes,
            kernel_init=self.kernel_init,
            bias_init=bias_init,
            dtype=jnp.promote_types(features.dtype, jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
            name="dense",
        )(features)
