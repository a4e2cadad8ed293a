# SPDX-License-Identifier: Apache-2.0
"""NCL: complete networks that learn from each other, on all classes and on the hardest ones (Li et
al., CVPR 2022).

Every network learns by balanced softmax, over all classes and once more over an image's hardest
ones, and from the predictions of the others on both. Nothing is shared: three networks cost three
times one.

Followed is the authors' code (Bazinga699/NCL): losses are summed over networks, hard classes are
those of the first network's raw logits, gradients flow to both sides of a divergence, and the
logits of other classes are multiplied by 0, so that they stay in the softmax, from which the paper
removes them. One of the published trainings on CIFAR has a contrastive branch as
well, which heeds no labels: each network learns to tell another view of an image from earlier
images, all as a moving average of the network projects them (MoCo, He et al., CVPR 2020). Here the
average begins as a copy of the network and moves as a whole; in the code it begins at random, and
its projection head stays there.

Two differences are of one step or epoch. Our average moves before it encodes a batch, the code's
after the forward pass. The code moves its schedule before an epoch: the rate on CIFAR drops one
epoch earlier than ours, in the 320th and the 360th of 400. Its cosine ends at 1e-4, ours near 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import cross_entropy, log_prior
from balpoe_jax.methods.augmentations import views
from balpoe_jax.methods.base import Context, Losses, Method, Network
from balpoe_jax.methods.contrastive import (
    ProjectedExperts,
    Projection,
    encode_keys,
    enqueue,
    init_momentum_encoder,
    update_momentum_encoder,
)
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.models import ExpertEnsemble
from balpoe_jax.models.heads import normalize
from balpoe_jax.setting import setting

_EPSILON = 1e-9  # within the logarithms of the divergence


def hard_classes(logits: jax.Array, labels: jax.Array, number: int) -> jax.Array:
    """The classes of the largest logits, the label's among them, bool `[B, C]`.

    The label's counts as one of `number`, also where its logit is not among the largest.

    Args:
        logits: float `[B, C]`.
        labels: int `[B]`.
        number: of classes for each row.
    """
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    _, indices = jax.lax.top_k(jnp.where(own, jnp.inf, logits), number)
    return jax.nn.one_hot(indices, logits.shape[-1], dtype=jnp.int32).sum(axis=1) > 0


def mutual_divergences(logits: jax.Array) -> jax.Array:
    """The sum over the others of `KL(other || own)` for each network, float `[E, B]`.

    Args:
        logits: float `[E, B, C]`; those that are minus infinity take no part.
    """
    p = jax.nn.softmax(logits)
    log_p = jnp.log(p + _EPSILON)
    # To the network on the first axis, from that on the second.
    pairs = (p[None] * (log_p[None] - log_p[:, None])).sum(axis=-1)
    return pairs.sum(axis=1)


def nested_losses(
    logits: jax.Array, labels: jax.Array, log_counts: jax.Array, number: int
) -> tuple[jax.Array, jax.Array]:
    """Each network's two cross-entropies, and its divergences from the others on both sets.

    Args:
        logits: float `[E, B, C]`, raw.
        labels: int `[B]`.
        log_counts: float `[C]`; not their shares, which a mask of zeros would tell apart.
        number: of hard classes.

    Returns:
        Two of float `[E, B]`.
    """
    adjusted = logits + log_counts.astype(logits.dtype)[None, None]
    hard = hard_classes(jax.lax.stop_gradient(logits[0]), labels, number)[None]
    masked = jnp.where(hard, adjusted, 0.0)
    own = sum(jax.vmap(cross_entropy, (0, None))(z, labels) for z in (adjusted, masked))
    return jnp.asarray(own), mutual_divergences(adjusted) + mutual_divergences(masked)


def contrastive_losses(
    queries: jax.Array, keys: jax.Array, queue: jax.Array, temperature: float
) -> jax.Array:
    """Of telling each image's own key from the queue: cross-entropies of similarities, `[E, B]`.

    Args:
        queries, keys: float `[E, B, P]`, projections of two views of the same images.
        queue: float `[K, E, P]`, of earlier images.
        temperature: that similarities are divided by.
    """
    highest = jax.lax.Precision.HIGHEST
    own = (queries * keys).sum(axis=-1, keepdims=True)
    others = jnp.einsum("ebp,kep->ebk", queries, queue, precision=highest)
    similarities = jnp.concatenate([own, others], axis=-1) / temperature
    return jax.nn.logsumexp(similarities, axis=-1) - similarities[..., 0]


@dataclasses.dataclass(frozen=True)
class NCL(Method):
    """See the module."""

    supports_mixing = False

    distillation: float = setting(
        0.6, "Weight of the divergences; each network has their mean over the others.", 0, 1e6
    )
    hard_share: float = setting(0.3, "Share of the classes that are hard for an image.", 0, 1)
    contrast: float = setting(0.0, "Weight of the contrastive branch; 0 for none.", 0, 1e6)
    temperature: float = setting(0.2, "Divisor of the branch's similarities.", 1e-6, 1e6)
    width: int = setting(64, "Width of the branch's projections.", 1, 1e6)
    queue_size: int = setting(
        1024, "Number of earlier images that it contrasts, the most recent ones.", 1, 1e9
    )
    momentum: float = setting(
        0.999, "Momentum of the moving average of the networks that encodes them.", 0, 1
    )

    @property
    def views(self) -> int:  # type: ignore[override]
        """The second one is for contrast."""
        return 2 if self.contrast else 1

    @property
    def needs_global_batch(self) -> bool:  # type: ignore[override]
        """With contrast it keeps state."""
        return self.contrast > 0

    def network(self, ensemble: ExpertEnsemble, context: Context) -> nn.Module:
        """The networks, for contrast each with a projection of a hidden layer."""
        if not self.contrast:
            return ensemble
        return ProjectedExperts(ensemble, Projection((0,), self.width, norm=False))

    def init_state(self, network: Network, context: Context, key: jax.Array) -> Any:
        """For contrast slow networks, copies of the fast ones, and a queue of noise."""
        if not self.contrast:
            return {}
        experts = len(jax.tree.leaves(network.params["projection"])[0])
        noise = jax.random.normal(key, (self.queue_size, experts, self.width))
        return {**init_momentum_encoder(network), "queue": normalize(noise, axis=-1)}

    def on_step_start(self, method_state: Any, params: Any, context: Context) -> Any:
        """The slow networks move before they encode a batch."""
        return (
            update_momentum_encoder(method_state, params, self.momentum)
            if self.contrast
            else method_state
        )

    def expert_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """Each network is balanced softmax."""
        return (1.0,) * len(taus)

    def loss(
        self, network: Network, method_state: Any, batch: TrainBatch, context: Context
    ) -> Losses:
        """The sum over networks of their means over rows."""
        outputs, batch_stats = network(batch.images)
        log_prior(context.class_counts)  # which refuses classes without examples
        number = max(1, int(self.hard_share * context.num_classes))
        log_counts = jnp.asarray(np.log(context.class_counts), jnp.float32)
        own, divergences = (
            each.mean(axis=1)
            for each in nested_losses(outputs.logits, batch.labels, log_counts, number)
        )
        others = max(1, len(own) - 1)
        distilled = self.distillation / others * divergences.sum()
        total, terms = own.sum() + distilled, {"distillation": distilled}
        if self.contrast:
            by_network, method_state = self._contrast(
                outputs, network, method_state, batch, context
            )
            terms["contrast"] = self.contrast * by_network.sum()
            total += terms["contrast"]
        return Losses(total, own, batch_stats, method_state, terms)

    def _contrast(
        self, outputs: Any, network: Network, method_state: Any, batch: TrainBatch, context: Context
    ) -> tuple[jax.Array, Any]:
        """Each network's mean over rows `[E]`, and the method state after the step."""
        encoded, slow_stats = encode_keys(network, method_state, batch.views[1], context)
        keys = jax.lax.stop_gradient(encoded.projections)
        losses = contrastive_losses(
            outputs.projections, keys, method_state["queue"], self.temperature
        )
        queue = enqueue(context.gather_state(keys.swapaxes(0, 1)), method_state["queue"])
        return losses.mean(axis=1), {**method_state, "batch_stats": slow_stats, "queue": queue}


_CIFAR = {
    "total_epochs": 400,
    "batch_size": 64,
    "model.classifier": "linear",
    "model.classifier_init": "torch",
    "optim.decay_epochs": (320, 360),
    "optim.warmup_start": 1 / 3,
    **views("strong"),
}
_PHOTOS = {
    "optim.learning_rate": 0.2,
    "model.classifier": "cosine_bias",
    **views("rand"),
}
_ON: dict[str, dict[str, Any]] = {
    "cifar10_lt": _CIFAR,
    "cifar100_lt": _CIFAR,
    "imagenet_lt": {
        **_PHOTOS,
        "total_epochs": 200,
        "batch_size": 256,
        "model.classifier_scale": 16.0,
    },
    "inaturalist2018": {
        **_PHOTOS,
        "total_epochs": 400,
        "batch_size": 512,
        "model.classifier_scale": 32.0,
    },
}
_CIFAR_VIEWS, _PHOTO_VIEWS = views("strong", "similar"), views("rand", "photo_similar")
_FIELDS = {"model.shared_stages": -1, "optim.weight_decay": 2e-4}
_PAPER = "BalPoE's Table 1"

PRESETS = {
    "ncl": Preset(
        NCL(),
        "NCL",
        experts=3,
        fields=_FIELDS,
        on=_ON,
        epochs=400,
        published=(
            PublishedResult("cifar100_lt", "ir=50", 58.2, _PAPER),
            PublishedResult("cifar100_lt", "ir=100", 54.2, _PAPER),
            PublishedResult("imagenet_lt", "", 59.5, _PAPER),
            PublishedResult("imagenet_lt", "backbone=resnext50", 60.5, _PAPER),
            PublishedResult("inaturalist2018", "", 74.9, _PAPER),
        ),
    ),
    "ncl_contrast": Preset(
        NCL(contrast=1.0),
        "NCL with its contrastive branch",
        experts=3,
        fields=_FIELDS,
        # For photographs none is published: the views are PaCo's.
        on={
            name: {**fields, **(_CIFAR_VIEWS if "cifar" in name else _PHOTO_VIEWS)}
            for name, fields in _ON.items()
        },
        epochs=400,
    ),
}
