# SPDX-License-Identifier: Apache-2.0
"""Consistency self-distillation: MDCS (Zhao et al., ICCV 2023), and BalPoE with it.

Each expert learns on a strongly augmented view of an image what it predicts on a weakly augmented
one, wherever that prediction is right. Where we differ from MDCS's code on purpose: the prior is in
shares of a class instead of in counts, which a softmax does not see; the code's unused weighting
and centring are left out.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import expert_losses, log_prior
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.base import Context, Losses, Method, Network, epochs, soft_labels
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.setting import setting


def adjusted(logits: jax.Array, context: Context) -> jax.Array:
    """Logits `[E, B, C]` plus `tau_e log prior`, in which view and teacher are compared."""
    bias = jnp.asarray(context.taus)[:, None] * log_prior(context.class_counts)[None]
    return logits + bias[:, None, :]


def consistency(weak: jax.Array, strong: jax.Array, labels: jax.Array) -> jax.Array:
    """How far each expert's predictions on strong views are from its own on weak ones.

    `KL(softmax(weak) || softmax(strong))`, averaged over the images that the expert classifies
    correctly in the weak view; 0 where there are none. The weak view gets no gradient.

    Args:
        weak, strong: adjusted logits `[E, B, C]` of the whole batch.
        labels: int `[B]`.

    Returns:
        float `[E]`.
    """
    weak = jax.lax.stop_gradient(weak)
    teacher, student = jax.nn.log_softmax(weak), jax.nn.log_softmax(strong)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    kept = (jnp.argmax(weak, axis=-1) == labels[None]).astype(divergence.dtype)
    return jnp.sum(kept * divergence, axis=1) / jnp.maximum(1, kept.sum(axis=1))


@dataclasses.dataclass(frozen=True)
class _SelfDistilled(Method):
    """What both methods have."""

    needs_global_batch = True

    mu: float = setting(0.6, "Weight of the consistency.", 0, 1e6)
    warmup_epochs: int = epochs(
        20,
        "Number of epochs over which the weight grows, from `mu / warmup_epochs` in the first; 0 "
        "for the whole weight from the start.",
        0,
        1e6,
    )

    def expert_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """Those of the config."""
        return taus

    def weight(self, epoch: jax.Array) -> jax.Array:
        """Of the consistency in a 0-based epoch."""
        return self.mu * jnp.minimum((epoch + 1) / max(1, self.warmup_epochs), 1)

    def consistency(
        self, weak: jax.Array, strong: jax.Array, labels: jax.Array, context: Context
    ) -> jax.Array:
        """`consistency` of raw logits `[E, b, C]` of this device, over the whole batch."""
        views = jnp.stack([adjusted(weak, context), adjusted(strong, context)])
        rows = context.gather(jnp.moveaxis(views, 2, 0))  # [B, 2, E, C]
        weak, strong = jnp.moveaxis(rows, 0, 2)
        return consistency(weak, strong, context.gather(labels))


class _Views(NamedTuple):
    """Raw logits `[E, b, C]` by view, and the new statistics."""

    logits: tuple[jax.Array, ...]
    batch_stats: dict


def _apply_to_views(network: Network, batch: TrainBatch) -> _Views:
    """One pass over all views, whose batch statistics are those of all."""
    outputs, batch_stats = network(jnp.concatenate(batch.views))
    return _Views(tuple(jnp.split(outputs.logits, len(batch.views), axis=1)), batch_stats)


@dataclasses.dataclass(frozen=True)
class BalPoECS(_SelfDistilled):
    """BalPoE plus the mean over experts of their consistency; ours, for want of a publication.

    The first view is strongly augmented and mixed, and alone in BalPoE's loss; the second is weakly
    augmented and the third strongly, neither mixed. With `mu = 0` it is BalPoE, and the other
    views are not looked at; with any other `mu` BatchNorm's statistics are those of all views.
    """

    views = 3

    def loss(
        self, network: Network, method_state: dict, batch: TrainBatch, context: Context
    ) -> Losses:
        """BalPoE's mean over experts and rows, plus the weighted consistency."""
        if self.mu == 0:
            return BalPoE().loss(network, method_state, batch, context)
        (mixed, weak, strong), batch_stats = _apply_to_views(network, batch)
        by_expert = expert_losses(
            mixed,
            soft_labels(batch, context.num_classes),
            log_prior(context.class_counts),
            jnp.asarray(context.taus),
        ).mean(axis=1)
        added = self.consistency(weak, strong, batch.labels, context).mean()
        total = by_expert.mean() + self.weight(context.epoch) * added
        return Losses(total, by_expert, batch_stats, method_state, {"consistency": added})


@dataclasses.dataclass(frozen=True)
class MDCS(_SelfDistilled):
    """MDCS as its code trains: sums over experts, both views in the cross-entropy, no mixing.

    The first view is strongly augmented, the second weakly. Mixed images are none of its recipe,
    and would be compared with unmixed ones: mix with `BalPoECS`.
    """

    views = 2
    supports_mixing = False

    def loss(
        self, network: Network, method_state: dict, batch: TrainBatch, context: Context
    ) -> Losses:
        """The sum over experts of the mean cross-entropy of both views and the consistency."""
        (strong, weak), batch_stats = _apply_to_views(network, batch)
        prior, taus = log_prior(context.class_counts), jnp.asarray(context.taus)
        by_expert = jnp.stack(
            [
                expert_losses(strong, soft_labels(batch, context.num_classes), prior, taus),
                expert_losses(weak, batch.labels, prior, taus),
            ]
        ).mean(axis=(0, 2))
        added = self.consistency(weak, strong, batch.labels, context).sum()
        total = by_expert.sum() + self.weight(context.epoch) * added
        return Losses(total, by_expert, batch_stats, method_state, {"consistency": added})


# The published networks are narrower than BalPoE's.
_NARROW = {"model.reduce_dimension": True}

# Views as MDCS has them: weak ones are the data set's usual, which `view2` starts from on CIFAR.
_CIFAR_STRONG = {"rotation": 0.0, "policy": "autoaugment_cifar"}
_PHOTO_WEAK = {"crop_padding": 0, "rotation": 0.0, "color_jitter": (0.4, 0.4, 0.4)}
_PHOTO_STRONG = {**_PHOTO_WEAK, "policy": "randaugment"}


def _section(name: str, fields: dict) -> dict:
    return {f"{name}.{field}": value for field, value in fields.items()}


_CIFAR_VIEWS = {"view2.rotation": 15.0, **_section("augment", _CIFAR_STRONG)}
_PHOTO_VIEWS = _section("view2", _PHOTO_WEAK) | _section("augment", _PHOTO_STRONG)
_CIFAR_CS = _CIFAR_VIEWS | _section("view3", _CIFAR_STRONG)
_PHOTO_CS = _PHOTO_VIEWS | _section("view3", _PHOTO_STRONG)

_CIFAR_MDCS = {
    **_CIFAR_VIEWS,
    "augment.cutout": 16,
    "total_epochs": 400,
    "batch_size": 64,
    "optim.decay_epochs": (200, 320, 380),
    "optim.warmup_epochs": 20,
    **_NARROW,
}

PRESETS = {
    "balpoe_cs": Preset(
        BalPoECS(),
        "BalPoE + consistency",
        experts=3,
        mixup=True,
        on={
            "cifar100_lt": _CIFAR_CS,
            "cifar10_lt": _CIFAR_CS,
            "imagenet_lt": _PHOTO_CS,
            "inaturalist2018": _PHOTO_CS,
        },
    ),
    "mdcs": Preset(
        MDCS(),
        "MDCS",
        experts=3,
        taus=(-0.5, 2.5),
        on={
            "cifar100_lt": _CIFAR_MDCS,
            "cifar10_lt": _CIFAR_MDCS,
            "imagenet_lt": {
                **_PHOTO_VIEWS,
                **_NARROW,
                "total_epochs": 180,
                "batch_size": 256,
                "optim.learning_rate": 0.1,
            },
            "imagenet_lt:recipe=long": {"total_epochs": 400},
            "inaturalist2018": {
                **_PHOTO_VIEWS,
                **_NARROW,
                "total_epochs": 400,
                "batch_size": 512,
                "optim.schedule": "step",
                "optim.decay_epochs": (200, 300, 380),
                "optim.warmup_epochs": 5,
            },
        },
        epochs=400,
        published=(PublishedResult("cifar100_lt", "ir=100", 56.1, "MDCS's supplement, Table 1"),),
    ),
}
