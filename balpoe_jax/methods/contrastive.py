# SPDX-License-Identifier: Apache-2.0
"""What contrastive methods share: projection heads beside classifiers, a slow network, a queue."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from balpoe_jax.errors import UserError
from balpoe_jax.methods.base import Context, Network
from balpoe_jax.models import ExpertEnsemble
from balpoe_jax.models.heads import normalize, torch_uniform
from balpoe_jax.models.layers import BatchNorm


class ProjectedOutputs(NamedTuple):
    """What a network with a projection head returns.

    Attributes:
        logits: float `[1, B, C]`.
        features: float `[1, B, D]`.
        projections: float `[B, P]`, of length 1.
        prototypes: float `[C, P]`, of length 1; without rows where a method has none.
    """

    logits: jax.Array
    features: jax.Array
    projections: jax.Array
    prototypes: jax.Array


class Projection(nn.Module):
    """A perceptron onto the unit sphere.

    Attributes:
        hidden: widths of the hidden layers; 0 for that of the layer before.
        width: of the result.
        norm: whether BatchNorm follows the hidden layers.
        axis_name: the mapped axis over which it takes its statistics.
        last_init: Initialiser of the last layer.
    """

    hidden: tuple[int, ...]
    width: int
    norm: bool = True
    axis_name: str | None = None
    last_init: nn.initializers.Initializer = torch_uniform

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, D]` -> `[B, width]`, rows of length 1."""
        for i, width in enumerate(self.hidden):
            x = nn.Dense(width or x.shape[-1], kernel_init=torch_uniform, name=f"hidden{i}")(x)
            if self.norm:
                norm = BatchNorm(
                    use_running_average=not train, axis_name=self.axis_name, name=f"bn{i}"
                )
                x = norm(x)
            x = nn.relu(x)
        return normalize(nn.Dense(self.width, kernel_init=self.last_init, name="out")(x), axis=-1)


class ProjectedEnsemble(nn.Module):
    """One expert with a projection of its features, and perhaps prototypes of the classes.

    Prototypes are a second head's projections of the rows of the classifier's weights, which learn
    through it.

    Attributes:
        ensemble: of one expert.
        projection: of features.
        prototype: of classifier weights; None for no prototypes.
    """

    ensemble: ExpertEnsemble
    projection: Projection
    prototype: Projection | None = None

    def __call__(self, images: jax.Array, train: bool) -> ProjectedOutputs:
        """As the ensemble's, with what the heads make of it."""
        outputs = self.ensemble(images, train)
        projections = self.projection(outputs.features[0], train)
        prototypes = projections[:0]
        if self.prototype is not None:
            head = self.ensemble.variables["params"]["expert"]["head"]
            kernel = head["dense"]["kernel"] if "dense" in head else head["kernel"]
            prototypes = self.prototype(kernel[0].T, train)
        return ProjectedOutputs(outputs.logits, outputs.features, projections, prototypes)


class ProjectedExpertsOutputs(NamedTuple):
    """What a network with a projection head for each expert returns.

    Attributes:
        logits: float `[E, B, C]`.
        features: float `[E, B, D]`.
        projections: float `[E, B, P]`, of length 1.
    """

    logits: jax.Array
    features: jax.Array
    projections: jax.Array


class ProjectedExperts(nn.Module):
    """Experts, each with a projection of its features.

    Attributes:
        ensemble: of the experts.
        projection: of one expert's features, without BatchNorm; its parameters are stacked as the
            experts' are.
    """

    ensemble: ExpertEnsemble
    projection: Projection

    def __call__(self, images: jax.Array, train: bool) -> ProjectedExpertsOutputs:
        """As the ensemble's, with what the heads make of it."""
        outputs = self.ensemble(images, train)
        project = nn.vmap(
            lambda head, features: head(features, train),
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return ProjectedExpertsOutputs(
            outputs.logits, outputs.features, project(self.projection, outputs.features)
        )


# The slow network, a moving average that encodes images to contrast, is in the method state as
# `params` and `batch_stats`.


def init_momentum_encoder(network: Network) -> dict[str, Any]:
    """The slow network's variables at the start, those of the fast one."""
    return {"params": network.params, "batch_stats": network.batch_stats}


def update_momentum_encoder(method_state: Any, params: Any, momentum: float) -> Any:
    """The method state with the slow network a step nearer to the fast one's `params`."""
    # Of two that are interpolated it does not matter which is called new, but for the last bit.
    slow = optax.incremental_update(method_state["params"], params, momentum)
    return {**method_state, "params": slow}


def encode_keys(
    network: Network, method_state: Any, images: jax.Array, context: Context
) -> tuple[Any, Any]:
    """The slow network's outputs for images, and its statistics, equal on all devices."""
    slow = dataclasses.replace(
        network, params=method_state["params"], batch_stats=method_state["batch_stats"]
    )
    outputs, batch_stats = slow(images)
    if not context.sync_batch_norm:
        batch_stats = context.mean_over_devices(batch_stats)
    return outputs, batch_stats


def enqueue(rows: jax.Array, queue: jax.Array) -> jax.Array:
    """A queue of the same length with these rows in front; its oldest ones are gone."""
    return jnp.concatenate([rows, queue])[: len(queue)]


def check_single(ensemble: ExpertEnsemble, name: str) -> None:
    """Refuses more than one expert, of which these methods know nothing.

    Raises:
        UserError (a `ValueError`): several experts.
    """
    if ensemble.num_experts != 1:
        raise UserError(
            f"{name} trains one expert, got {ensemble.num_experts}; leave experts alone."
        )


def equal_labels(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Whether labels int `[B]` and `[A]` are equal, float `[B, A]`."""
    return (rows[:, None] == columns[None, :]).astype(jnp.float32)
