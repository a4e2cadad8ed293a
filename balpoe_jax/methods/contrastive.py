# SPDX-License-Identifier: Apache-2.0
"""Parts of contrastive methods: projection heads, a slow network, a queue."""

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
    """The outputs of a network with a projection head.

    Attributes:
        logits: Logits of the one expert, float `[1, B, C]`.
        features: Features of the one expert, float `[1, B, D]`.
        projections: Projections float `[B, P]`, of length 1 if the heads normalise.
        prototypes: Prototypes float `[C, P]`, like the projections; `[0, P]` for a method without
            any.
    """

    logits: jax.Array
    features: jax.Array
    projections: jax.Array
    prototypes: jax.Array


class Projection(nn.Module):
    """A perceptron onto the unit sphere, or into the space around it.

    Attributes:
        hidden: Widths of the hidden layers; 0 for the width of the layer's input.
        width: Width of the result.
        norm: Whether BatchNorm follows the hidden layers.
        axis_name: Mapped axis over which it takes its statistics.
        last_init: Initialiser of the last layer.
        unit: Whether the result is scaled to length 1.
    """

    hidden: tuple[int, ...]
    width: int
    norm: bool = True
    axis_name: str | None = None
    last_init: nn.initializers.Initializer = torch_uniform
    unit: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, D]` -> `[B, width]`."""
        for i, width in enumerate(self.hidden):
            x = nn.Dense(width or x.shape[-1], kernel_init=torch_uniform, name=f"hidden{i}")(x)
            if self.norm:
                norm = BatchNorm(
                    use_running_average=not train, axis_name=self.axis_name, name=f"bn{i}"
                )
                x = norm(x)
            x = nn.relu(x)
        x = nn.Dense(self.width, kernel_init=self.last_init, name="out")(x)
        return normalize(x, axis=-1) if self.unit else x


class ProjectedEnsemble(nn.Module):
    """One expert with a projection of its features, and perhaps prototypes of the classes.

    A prototype is the projection of a class's weights in the classifier by a second head. The
    weights get gradients from it.

    Attributes:
        ensemble: Ensemble of one expert.
        projection: Head that projects features.
        prototype: Head that projects classifier weights; None for no prototypes.
    """

    ensemble: ExpertEnsemble
    projection: Projection
    prototype: Projection | None = None

    def __call__(self, images: jax.Array, train: bool) -> ProjectedOutputs:
        """The ensemble's outputs and their projections."""
        outputs = self.ensemble(images, train)
        projections = self.projection(outputs.features[0], train)
        prototypes = projections[:0]
        if self.prototype is not None:
            head = self.ensemble.variables["params"]["expert"]["head"]
            kernel = head["dense"]["kernel"] if "dense" in head else head["kernel"]
            prototypes = self.prototype(kernel[0].T, train)
        return ProjectedOutputs(outputs.logits, outputs.features, projections, prototypes)


class ProjectedExpertsOutputs(NamedTuple):
    """The outputs of a network with a projection head for each expert.

    Attributes:
        logits: Logits float `[E, B, C]`.
        features: Features float `[E, B, D]`.
        projections: Projections of length 1, float `[E, B, P]`.
    """

    logits: jax.Array
    features: jax.Array
    projections: jax.Array


class ProjectedExperts(nn.Module):
    """Experts, each with a projection of its features.

    Attributes:
        ensemble: Ensemble of the experts.
        projection: Head, without BatchNorm, that projects one expert's features; its parameters are
            stacked like the experts'.
    """

    ensemble: ExpertEnsemble
    projection: Projection

    def __call__(self, images: jax.Array, train: bool) -> ProjectedExpertsOutputs:
        """The ensemble's outputs and their projections."""
        outputs = self.ensemble(images, train)
        project = nn.vmap(
            lambda head, features: head(features, train),
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return ProjectedExpertsOutputs(
            outputs.logits, outputs.features, project(self.projection, outputs.features)
        )


def init_momentum_encoder(network: Network) -> dict[str, Any]:
    """The slow network's variables at the start, a copy of the fast one's.

    The slow network is a moving average of the fast one; it encodes the images to contrast with.
    The method state holds it as `params` and `batch_stats`.
    """
    return {"params": network.params, "batch_stats": network.batch_stats}


def update_momentum_encoder(method_state: Any, params: Any, momentum: float) -> Any:
    """The method state with the slow network a step nearer to the fast one's `params`."""
    # Swapping the two networks and using 1 - momentum would change the last bits.
    slow = optax.incremental_update(method_state["params"], params, momentum)
    return {**method_state, "params": slow}


def encode_keys(
    network: Network, method_state: Any, images: jax.Array, context: Context
) -> tuple[Any, Any]:
    """The slow network's outputs for images, and its BatchNorm averages, equal on all devices."""
    slow = dataclasses.replace(
        network, params=method_state["params"], batch_stats=method_state["batch_stats"]
    )
    outputs, batch_stats = slow(images)
    if not context.sync_batch_norm:
        batch_stats = context.mean_over_devices(batch_stats)
    return outputs, batch_stats


def enqueue(rows: jax.Array, queue: jax.Array) -> jax.Array:
    """The queue with these rows in front and as many of its oldest rows dropped."""
    return jnp.concatenate([rows, queue])[: len(queue)]


def check_single(ensemble: ExpertEnsemble, name: str) -> None:
    """Raises an error for several experts, which these methods do not support.

    Raises:
        UserError (a `ValueError`): more than one expert.
    """
    if ensemble.num_experts != 1:
        raise UserError(
            f"{name} trains one expert, got {ensemble.num_experts}; leave experts alone."
        )


def equal_labels(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Whether labels int `[B]` and `[A]` are equal, float `[B, A]`."""
    return (rows[:, None] == columns[None, :]).astype(jnp.float32)
