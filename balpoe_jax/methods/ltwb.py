# SPDX-License-Identifier: Apache-2.0
"""LTWB: weights balanced by weight decay, and in a second phase by MaxNorm (Alshammari et al., CVPR
2022).

The first phase is cross-entropy with ten times the usual weight decay. The second one trains only
the classifier, by the class-balanced loss, with weight decay and MaxNorm: after every update each
class's weight vector is projected onto a ball. Its radius is the smallest norm of the vectors after
the first phase plus a tenth of the way to the largest, as in the authors' code
(ShadeAlsha/LTR-weight-balancing). The bias is free. BatchNorm's averages keep moving.

The class-balanced loss is the code's, since the published figures rest on it: the binary
cross-entropy of the softmax, weighted by the label's class, the mean over rows and classes. For 100
classes it is about a hundredth of a cross-entropy, with the same weight decay.

Where we differ: the code projects once an epoch, and steps its schedule before an epoch, so that
the last epoch has a rate of 0. On CIFAR the first phase has 200 epochs, in the code 320. The
network is that of the other methods; the code has a ResNet-34. For photographs the second phase is
CIFAR's, since the authors' settings are not known.

The published figures are not of a last epoch. The authors take the epoch that is best on the test
images, and average the logits of an image and its mirror image. Their notebook prints 53.1 this way
for ratio 100; its log has 51.8 for the last epoch without mirror images.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import class_balanced_weights
from balpoe_jax.methods.base import Context, ExpertLosses, Phase, map_by_path, mix_losses
from balpoe_jax.methods.classifier import cross_entropies, in_classifier
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.models import ExpertEnsemble, Outputs
from balpoe_jax.optim import followed_by
from balpoe_jax.setting import setting


class BoundedEnsemble(nn.Module):
    """An ensemble with a radius for each expert's classifier, which its outputs do not use."""

    ensemble: ExpertEnsemble

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Outputs:
        """The ensemble's outputs."""
        self.param("radius", nn.initializers.ones, (self.ensemble.num_experts,))
        return self.ensemble(images, train)


def is_classifier_kernel(path: str) -> bool:
    """Whether a parameter holds the classes' weight vectors, `[E, D, C]`."""
    return in_classifier(path) and path.endswith("kernel")


def radius_between(kernel: jax.Array, share: float) -> jax.Array:
    """The radius for each expert, float `[E]`, between the norms of its classes' weight vectors.

    Args:
        kernel: Weights with a column for each class, float `[E, D, C]`.
        share: Place of the radius, 0 for the smallest norm and 1 for the largest.
    """
    norms = jnp.linalg.norm(kernel, axis=1)
    least, largest = norms.min(axis=1), norms.max(axis=1)
    return least + share * (largest - least)


def project_classes(kernel: jax.Array, radius: jax.Array) -> jax.Array:
    """The weights with the vectors that are longer than the radius projected onto the ball.

    Args:
        kernel: Weights with a column for each class, float `[E, D, C]`.
        radius: Radius for each expert, float `[E]`.
    """
    of_class = optax.projections.projection_l2_ball
    of_expert = jax.vmap(of_class, in_axes=(1, None), out_axes=1)
    return jax.vmap(of_expert)(kernel, radius)


def binary_cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over classes of binary cross-entropies of the softmax, float `[E, b]`.

    Args:
        logits: float `[E, b, C]`.
        labels: int `[b]`; the probability of this class should be 1, and that of others 0.
    """
    classes = logits.shape[-1]
    is_label = jax.nn.one_hot(labels, classes, dtype=bool)[None]
    return -jnp.where(is_label, jax.nn.log_softmax(logits), _log_complement(logits)).mean(axis=-1)


def _log_complement(logits: jax.Array) -> jax.Array:
    """The logarithm of 1 less each class's probability, float `[..., C]`.

    Of the likeliest class it is taken from the other ones, since its probability may round to 1.
    """
    is_top = jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=bool)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    others = jax.nn.logsumexp(logits, axis=-1, keepdims=True, where=~is_top)
    probabilities = jnp.where(is_top, 0.0, jax.nn.softmax(logits))
    return jnp.where(is_top, others - total, jnp.log1p(-probabilities))


def _max_norm() -> optax.GradientTransformation:
    """A transformation of updates that makes the updated weights lie in their ball."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def change(is_kernel: bool, update: jax.Array, old: jax.Array) -> jax.Array:
            return project_classes(old + update, params["radius"]) - old if is_kernel else update

        kernels = map_by_path(lambda path, _: is_classifier_kernel(path), updates)
        return jax.tree.map(change, kernels, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@dataclasses.dataclass(frozen=True)
class LTWB(ExpertLosses):
    """See the module."""

    beta: float = setting(
        0.9999, "Base of the effective numbers of the class-balanced loss.", 0, 1 - 1e-9
    )
    radius_share: float = setting(
        0.1, "Place of the radius between the smallest norm (0) and the largest (1).", 0, 1
    )

    def network(self, ensemble: ExpertEnsemble, context: Context) -> BoundedEnsemble:
        """The ensemble with the radius as a parameter, so that checkpoints hold it."""
        return BoundedEnsemble(ensemble)

    def phases(self) -> tuple[Phase, ...]:
        """Cross-entropy, then the classifier alone with MaxNorm."""
        return (
            Phase("training", self.loss, lambda path: path != "radius"),
            Phase(
                "classifier balancing",
                partial(self.loss_of, self.balanced_losses),
                in_classifier,
                lambda optimizer, params: followed_by(optimizer, _max_norm()),
                self.with_radius,
            ),
        )

    def with_radius(self, params: Any, key: jax.Array, context: Context) -> Any:
        """The parameters with the radius that follows from the classifier's norms."""
        paths = jax.tree.leaves(map_by_path(lambda path, _: is_classifier_kernel(path), params))
        leaves = zip(paths, jax.tree.leaves(params), strict=True)
        (kernel,) = [leaf for is_kernel, leaf in leaves if is_kernel]
        return {**params, "radius": radius_between(kernel, self.radius_share)}

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies."""
        return cross_entropies(logits, batch)

    def balanced_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Binary cross-entropies, each times the weight of its class."""
        weights = jnp.asarray(class_balanced_weights(context.class_counts, self.beta), logits.dtype)
        return mix_losses(
            batch, lambda labels: weights[labels][None] * binary_cross_entropies(logits, labels)
        )


_CIFAR = {
    "batch_size": 64,
    "optim.learning_rate": 0.01,
    "optim.weight_decay": 5e-3,
    "optim.schedule": "cosine",
    "optim.decay_epochs": (),
    "optim.warmup_epochs": 0,
    "augment.rotation": 0.0,
}

_NOTEBOOK, _QUOTED = "the authors' notebook", "the paper, by Papers with Code"
_NETWORK = "ResNet-34"

PRESETS = {
    "ltwb": Preset(
        LTWB(),
        "weight balancing, with MaxNorm",
        fields={
            "model.classifier": "linear",
            "optim.nesterov": False,
            "phase2.epochs": 10,
            "phase2.learning_rate": 0.01,
            "phase2.weight_decay": 0.1,
        },
        on={"cifar10_lt": _CIFAR, "cifar100_lt": _CIFAR},
        published=(
            PublishedResult("cifar100_lt", "ir=10", 68.67, _QUOTED, network=_NETWORK),
            PublishedResult("cifar100_lt", "ir=100", 53.1, _NOTEBOOK, network=_NETWORK),
        ),
    ),
}
