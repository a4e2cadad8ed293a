# SPDX-License-Identifier: Apache-2.0
"""Experts that compile in a second on a CPU, to try out a benchmark whose figures do not count."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn

from balpoe_jax.experiment import build
from balpoe_jax.models.ensemble import Expert, ExpertEnsemble
from balpoe_jax.models.heads import CosineHead, LinearHead
from balpoe_jax.models.layers import BatchNorm, global_average

_PATCH = 8


class Trunk(nn.Module):
    """Means of patches, a dense layer and BatchNorm."""

    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, 3]` -> `[B, H / 8, W / 8, 6]`."""
        norm = BatchNorm(not train, axis_name=self.axis_name, dtype=self.dtype)
        x = nn.avg_pool(images, (_PATCH, _PATCH), (_PATCH, _PATCH))
        return nn.relu(norm(nn.Dense(6, dtype=self.dtype)(x)))


class Body(nn.Module):
    """A dense layer and BatchNorm, then the mean over pixels."""

    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, h, w, 6]` -> `[B, 8]`."""
        norm = BatchNorm(not train, axis_name=self.axis_name, dtype=self.dtype)
        return global_average(nn.relu(norm(nn.Dense(8, dtype=self.dtype)(x))))


def create_model(
    name: str,
    *,
    num_classes: int,
    num_experts: int,
    axis_name: str | None,
    expert_map: str,
    classifier: str,
    scale: float,
    dtype: Any,
    **_: Any,
) -> ExpertEnsemble:
    """A replacement of `balpoe_jax.models.create_model` that ignores the name."""
    cosine = classifier == "cosine"
    head = CosineHead(num_classes, scale) if cosine else LinearHead(num_classes)
    expert = Expert(Body(axis_name, dtype), head)
    return ExpertEnsemble(Trunk(axis_name, dtype), expert, num_experts, expert_map)


@contextlib.contextmanager
def used(toy: bool) -> Iterator[None]:
    """Gives experiments that are built inside this network if `toy`."""
    before = build.create_model
    if toy:
        build.create_model = create_model  # type: ignore[assignment]
    try:
        yield
    finally:
        build.create_model = before
