# SPDX-License-Identifier: Apache-2.0
"""Experts that compile in a second, and batches with all that a method may use."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.models.ensemble import Expert, ExpertEnsemble, Outputs
from balpoe_jax.models.heads import CosineHead, LinearHead
from balpoe_jax.models.layers import BatchNorm, global_average

COUNTS = np.array([50, 20, 10, 5, 2])
SHAPE = (4, 4, 3)


class Trunk(nn.Module):
    """A dense layer on every pixel, with BatchNorm, as its only stage."""

    axis_name: str | None = None
    dtype: Any = None
    all_stages: bool = False
    channels: tuple[int, ...] = (6,)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Any:
        norm = BatchNorm(not train, axis_name=self.axis_name, dtype=self.dtype)
        x = nn.relu(norm(nn.Dense(6, dtype=self.dtype)(images)))
        return (x,) if self.all_stages else x


class Body(nn.Module):
    """Another dense layer with BatchNorm, then pooling.

    With a factor its map has half the side, as a later stage's has.
    """

    axis_name: str | None = None
    dtype: Any = None
    channels: tuple[int, ...] = (8,)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, factor: jax.Array | None = None) -> jax.Array:
        norm = BatchNorm(not train, axis_name=self.axis_name, dtype=self.dtype)
        x = nn.relu(norm(nn.Dense(8, dtype=self.dtype)(x)))
        return global_average(x if factor is None else x[:, ::2, ::2] * factor)


def experts(
    number: int,
    axis_name: str | None = None,
    classifier: str = "cosine",
    scale: float = 30.0,
    classes: int = len(COUNTS),
    dtype: Any = None,
) -> ExpertEnsemble:
    """Experts with 8 features, by default for the classes of `COUNTS`."""
    head = CosineHead(classes, scale) if classifier == "cosine" else LinearHead(classes)
    expert = Expert(Body(axis_name, dtype), head)
    return ExpertEnsemble(Trunk(axis_name, dtype), expert, number, "loop")


def create_model(
    name: str,
    *,
    num_classes: int,
    num_experts: int,
    axis_name: str | None,
    classifier: str,
    scale: float,
    dtype: Any,
    **_: Any,
) -> ExpertEnsemble:
    """A replacement of `models.create_model` that ignores the backbone."""
    return experts(num_experts, axis_name, classifier, scale, num_classes, dtype)


def batch(size: int = 16, seed: int = 0, dtype: Any = np.float32, views: int = 3) -> TrainBatch:
    """A batch with up to three views, mixed labels, and every class."""
    random = np.random.default_rng(seed)
    drawn = tuple(random.normal(size=(size, *SHAPE)).astype(dtype) for _ in range(3))
    return TrainBatch(
        views=drawn[:views],
        labels=(np.arange(size) % len(COUNTS)).astype(np.int32),
        other_labels=random.integers(0, len(COUNTS), size).astype(np.int32),
        mix_weight=random.uniform(size=size).astype(dtype),
    )


def init(network: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Variables of a network, without a mapped axis."""
    return jax.jit(lambda key: network.init(key, jnp.zeros((1, *SHAPE)), train=False))(
        jax.random.key(seed)
    )


def logits_as_images(images: Any, train: bool = True) -> tuple[Outputs, dict]:
    """A replacement of a `Network` whose logits `[E, B, C]` are its images `[B, E, C]`."""
    logits = jnp.moveaxis(images, 1, 0)
    return Outputs(logits, logits), {}


def numeric_gradient(function: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """The gradient of a function of an array, by central differences in double precision."""
    gradient, step = np.zeros(x.shape), 1e-6
    for index in np.ndindex(x.shape):
        shifted = [x.copy(), x.copy()]
        shifted[0][index] += step
        shifted[1][index] -= step
        gradient[index] = (function(shifted[0]) - function(shifted[1])) / (2 * step)
    return gradient
