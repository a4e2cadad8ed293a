# SPDX-License-Identifier: Apache-2.0
"""BalPoE: experts with logit-adjusted losses, averaged (Sanchez Aimar et al., CVPR 2023).

With one expert it is balanced softmax (tau 1) or cross-entropy (tau 0).
"""

import dataclasses

import jax
import jax.numpy as jnp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import expert_losses, log_prior
from balpoe_jax.methods.base import Context, ExpertLosses, soft_labels
from balpoe_jax.methods.preset import Preset, PublishedResult


@dataclasses.dataclass(frozen=True)
class BalPoE(ExpertLosses):
    """The mean over experts of `CE(f_e + tau_e log prior, y)`; see `losses.balpoe_loss`."""

    def expert_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """The taus of the config."""
        return taus

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies, adjusted by each expert's tau."""
        targets = soft_labels(batch, context.num_classes)
        prior, taus = log_prior(context.class_counts), jnp.asarray(context.taus)
        return expert_losses(logits, targets, prior, taus)


_TABLE_2 = "BalPoE's Table 2"

PRESETS = {
    "balpoe": Preset(
        BalPoE(),
        "BalPoE",
        experts=3,
        mixup=True,
        published=(PublishedResult("cifar100_lt", "ir=100", 52.0, _TABLE_2, ece=4.9),),
    ),
    "balanced_softmax": Preset(BalPoE(), "balanced softmax", taus=(1.0, 1.0), mixup=True),
    "cross_entropy": Preset(
        BalPoE(),
        "cross-entropy, with mixup unless `mixup=false`",
        taus=(0.0, 0.0),
        mixup=True,
        published=(PublishedResult("cifar100_lt", "ir=100", 40.8, _TABLE_2, ece=9.6),),
    ),
}
