# SPDX-License-Identifier: Apache-2.0
"""BalPoE+: heads trained once more, a spread of taus by class, consistency (ours, unpublished).

Each part can be turned off, and keeps what makes the ensemble unbiased, a mean bias of `log prior`:

- The heads' second phase (`phase2.epochs`) minimises the same losses on a trained trunk's features.
- The spread (`tail_spread`) moves an expert's tau away from the mean tau by a factor of the class.
  The mean over experts is that of the config for every class, whatever the factors.
- Consistency (`mu`, in `BalPoEPlusCS`) compares an expert with itself, both with the same bias.

Other parts are fields of the config and work with every method: an average of the weights
(`optim.ema`, `optim.swa`), stronger augmentation, and more experts of reduced widths. They change
neither losses nor taus. `balpoe_jax.reproduce.ablation` has a row for each part.
"""

import dataclasses

import jax
import jax.numpy as jnp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import expert_losses, log_prior
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.base import Context, Losses, Network, Phase, soft_labels
from balpoe_jax.methods.classifier import in_classifier
from balpoe_jax.methods.mdcs import PRESETS as CONSISTENCY_PRESETS
from balpoe_jax.methods.mdcs import BalPoECS, consistency
from balpoe_jax.methods.preset import Preset
from balpoe_jax.setting import setting


def class_factors(log_prior: jax.Array, tail_spread: float) -> jax.Array:
    """Factors float `[C]`: 1 for the most frequent class, `tail_spread` for the rarest.

    Between them they are linear in the logarithm of the count. Classes of one size have factor 1.

    Args:
        log_prior: float `[C]`, see `losses.log_prior`.
        tail_spread: Factor of the rarest class.
    """
    most, least = log_prior.max(), log_prior.min()
    rarity = (most - log_prior) / jnp.where(most > least, most - least, 1.0)
    return 1 + (tail_spread - 1) * rarity


def expert_biases(taus: jax.Array, log_prior: jax.Array, tail_spread: float) -> jax.Array:
    """What each expert's logits get in training, float `[E, C]`.

    With the mean tau `m`, expert `e` and class `c` have the tau `m + (tau_e - m) * factor_c`. The
    mean over experts is `m * log_prior`, so the factors cancel in the ensemble.

    Args:
        taus: float `[E]`.
        log_prior: float `[C]`, see `losses.log_prior`.
        tail_spread: Factor of the rarest class, see `class_factors`.
    """
    mean = taus.mean()
    factors = class_factors(log_prior, tail_spread)
    return (mean + (taus - mean)[:, None] * factors[None]) * log_prior[None]


@dataclasses.dataclass(frozen=True)
class BalPoEPlus(BalPoE):
    """BalPoE with a spread of taus by class, and a second phase of the heads; see the module."""

    tail_spread: float = setting(
        1.0,
        "Factor of the experts' distance from the mean tau for the rarest class; 1 for the most "
        "frequent one.",
        0,
        10,
    )

    def phases(self) -> tuple[Phase, ...]:
        """All parameters, then the heads alone."""
        return (
            Phase("training", self.loss),
            Phase("head training", self.head_loss, in_classifier),
        )

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies, adjusted by each expert's tau of each class."""
        targets = soft_labels(batch, context.num_classes)
        none, taus = jnp.zeros(context.num_classes), jnp.zeros(len(logits))
        return expert_losses(logits + self.biases(context)[:, None], targets, none, taus)

    def head_loss(
        self, network: Network, method_state: dict, batch: TrainBatch, context: Context
    ) -> Losses:
        """The same losses of the first view, on features as in a test."""
        losses = self.expert_losses
        return self.loss_of(losses, network, method_state, batch, context, train=False)

    def biases(self, context: Context) -> jax.Array:
        """What each expert's logits get, float `[E, C]`, see `expert_biases`."""
        taus = jnp.asarray(context.taus)
        return expert_biases(taus, log_prior(context.class_counts), self.tail_spread)


@dataclasses.dataclass(frozen=True)
class BalPoEPlusCS(BalPoEPlus, BalPoECS):
    """BalPoE+ with consistency in its first phase; views are those of `BalPoECS`."""

    def loss(
        self, network: Network, method_state: dict, batch: TrainBatch, context: Context
    ) -> Losses:
        """The mean over experts and rows, plus the weighted consistency."""
        if self.mu == 0:
            return super().loss(network, method_state, batch, context)
        outputs, batch_stats = network(jnp.concatenate(batch.views))
        mixed, weak, strong = jnp.split(outputs.logits, len(batch.views), axis=1)
        by_expert = self.expert_losses(mixed, batch, context).mean(axis=1)
        views = jnp.stack([weak, strong]) + self.biases(context)[None, :, None]
        rows = context.gather(jnp.moveaxis(views, 2, 0))  # [B, 2, E, C]
        weak, strong = jnp.moveaxis(rows, 0, 2)
        added = consistency(weak, strong, context.gather(batch.labels)).mean()
        total = by_expert.mean() + self.weight(context.epoch) * added
        return Losses(total, by_expert, batch_stats, method_state, {"consistency": added})


_HEADS = {"phase2.epochs": 20, "phase2.learning_rate": 0.1}

PRESETS = {
    "balpoe_plus": Preset(
        BalPoEPlus(),
        "BalPoE + head training",
        experts=3,
        mixup=True,
        fields=_HEADS,
    ),
    "balpoe_plus_cs": Preset(
        BalPoEPlusCS(),
        "BalPoE + head training, consistency",
        experts=3,
        mixup=True,
        fields=_HEADS,
        on=CONSISTENCY_PRESETS["balpoe_cs"].on,
    ),
}
