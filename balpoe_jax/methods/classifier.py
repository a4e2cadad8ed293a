# SPDX-License-Identifier: Apache-2.0
"""Parts of methods that train a classifier in its own phase."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import cross_entropy
from balpoe_jax.methods.base import mix_losses
from balpoe_jax.models.heads import CosineHead, LinearHead


def cross_entropies(
    logits: jax.Array, batch: TrainBatch, weights: jax.Array | None = None
) -> jax.Array:
    """The cross-entropy of each expert and row, float `[E, b]`.

    Args:
        logits: Logits float `[E, b, C]`.
        batch: Rows with two labels each, whose losses count by their shares.
        weights: Factor of the losses for each label, float `[C]`; None for none.
    """

    def losses(labels: jax.Array) -> jax.Array:
        plain = jax.vmap(cross_entropy, in_axes=(0, None))(logits, labels)
        return plain if weights is None else weights[labels][None] * plain

    return mix_losses(batch, losses)


def in_classifier(path: str) -> bool:
    """Whether a parameter with a path such as `expert/head/kernel` belongs to a head."""
    return "/head/" in f"/{path}"


def new_classifier(params: Any, key: jax.Array) -> Any:
    """The parameters with newly initialised heads, drawn for each expert by itself.

    Args:
        params: Tree of all parameters, experts' stacked `[E, ...]`.
        key: Key of the random numbers.

    Returns:
        A tree of the same structure, in which only the heads are new.
    """

    def renewed(name: str, part: Any) -> Any:
        if name == "head":
            return _new_head(part, key)
        return new_classifier(part, key) if isinstance(part, Mapping) else part

    return {name: renewed(name, part) for name, part in params.items()}


def _new_head(head: Mapping[str, Any], key: jax.Array) -> Any:
    """Initial values of a stack of heads, linear or cosine like the given ones."""
    linear = "dense" in head
    kernel = head["dense"]["kernel"] if linear else head["kernel"]
    experts, width, classes = kernel.shape
    module = LinearHead(classes) if linear else CosineHead(classes, use_bias="bias" in head)
    features = jnp.zeros((1, width), kernel.dtype)
    return jax.vmap(lambda key: module.init(key, features)["params"])(
        jax.random.split(key, experts)
    )
