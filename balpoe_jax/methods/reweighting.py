# SPDX-License-Identifier: Apache-2.0
"""Losses that weigh classes: class-balanced cross-entropy, focal loss, LDAM, each perhaps deferred
(2017 to 2019).

Class-balanced weights are those of Cui et al. (CVPR 2019), the focal loss that of Lin et al. (ICCV
2017), margins (LDAM) and deferred re-weighting (DRW) those of Cao et al. (NeurIPS 2019). Recipes
follow the training of Cao et al., on photographs that of CMO's code.

Weighted cross-entropy and LDAM are divided by the sum of the weights, the class-balanced focal loss
by the number of rows, as in the released code. The focal factor of that code takes the exponential
of the weighted loss for a probability, which it is not. The recipe of that loss follows the code;
`focal_p=unweighted` takes the network's probability.

Where we differ from the released code:

- Logits come scaled from the cosine head, and the margin is scaled by the same number. The released
  LDAM network returns bare cosines, so that its confidences are not those of its loss.
- The largest margin on iNaturalist is 0.3, as Cao et al. advise there; CMO's code has 0.5.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import (
    class_balanced_weights,
    cross_entropy,
    focal_loss,
    ldam_loss,
    ldam_margins,
    log_prior,
)
from balpoe_jax.methods.base import Context, ExpertLosses, epochs, mix_losses
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.setting import setting

BASES = ("cross_entropy", "focal", "ldam")
WEIGHTS = ("none", "class_balanced")
WEIGHT_NORMS = ("sum_w", "batch")
FOCAL_PROBABILITIES = ("unweighted", "weighted")


@dataclasses.dataclass(frozen=True)
class Reweighted(ExpertLosses):
    """The weighted mean over rows of a loss, and the mean over experts if there are several.

    In a mixed batch each row stands for its two labels, whose shares weigh beside their classes'
    weights. Mixed within a batch by one share that is what mixing the two weighted means gives.
    """

    base: str = setting("cross_entropy", "Name of the loss.", choices=BASES)
    weights: str = setting(
        "none", "Weights of the classes, see `class_balanced_weights`.", choices=WEIGHTS
    )
    beta: float = setting(0.9999, "Base of the effective number.", 0, 1 - 1e-9)
    reweight_epoch: int | None = epochs(
        0, "First epoch with class weights, counted from 0; None for never.", 0, 1e6
    )
    weight_norm: str = setting(
        "sum_w",
        "Divisor of the sum of weighted losses: the sum of the weights over the whole batch, as in "
        "PyTorch, or the number of rows.",
        choices=WEIGHT_NORMS,
    )
    gamma: float = setting(1.0, "Exponent of the focal loss.", 0, 100)
    focal_p: str = setting(
        "unweighted",
        "Probability in the focal factor: the network's, or the exponential of minus the weighted "
        "loss, as the released code has it.",
        choices=FOCAL_PROBABILITIES,
    )
    max_margin: float = setting(0.5, "Margin of the rarest class in LDAM.", 0, 100)

    @property
    def needs_global_batch(self) -> bool:  # type: ignore[override]
        """Where weights are normalised over the batch."""
        return self.weighs and self.weight_norm == "sum_w"

    @property
    def weighs(self) -> bool:
        """Whether there is an epoch with class weights."""
        return self.weights != "none" and self.reweight_epoch is not None

    def expert_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """Unweighted cross-entropy is that of tau 0."""
        plain = self.base == "cross_entropy" and not self.weighs
        return (0.0 if plain else None,) * len(taus)

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Weighted losses, which `expert_means` divides by what the weights come to."""
        # Log priors are not needed, but a class without examples has no weight and no margin.
        log_prior(context.class_counts)
        weights = self.class_weights(context).astype(logits.dtype)

        def of_expert(logits: jax.Array) -> jax.Array:
            return mix_losses(batch, lambda y: self.row_losses(logits, y, weights, context))

        return jax.vmap(of_expert)(logits)

    def expert_means(self, losses: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Weighted means; with "sum_w" over the weights of the whole batch."""
        means = losses.mean(axis=1)
        if not self.needs_global_batch:
            return means
        weights = self.class_weights(context).astype(losses.dtype)
        shares = mix_losses(batch, lambda labels: weights[labels])
        return means / context.mean_over_devices(shares.mean())

    def weighted_means(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Each expert's loss float `[E]` of logits `[E, b, C]`; their mean over devices counts."""
        return self.expert_means(self.expert_losses(logits, batch, context), batch, context)

    def class_weights(self, context: Context) -> jax.Array:
        """Those of the step's epoch, float `[C]`."""
        ones = jnp.ones(context.num_classes)
        if not self.weighs:
            return ones
        weights = jnp.asarray(class_balanced_weights(context.class_counts, self.beta))
        return jnp.where(context.epoch >= self.reweight_epoch, weights, ones)

    def row_losses(
        self, logits: jax.Array, labels: jax.Array, weights: jax.Array, context: Context
    ) -> jax.Array:
        """Weighted losses `[B]` of one expert's logits `[B, C]`."""
        if self.base == "ldam":
            margins = ldam_margins(context.class_counts, self.max_margin)
            return weights[labels] * ldam_loss(logits, labels, margins, context.scale)
        losses = cross_entropy(logits, labels)
        if self.base == "cross_entropy":
            return weights[labels] * losses
        if self.focal_p == "weighted":
            return focal_loss(weights[labels] * losses, self.gamma)
        return weights[labels] * focal_loss(losses, self.gamma)


# The training of Cao et al., and on photographs that of later work on the same code (CMO's).
TRAINING: dict[str, Any] = {
    "optim.nesterov": False,
    "optim.weight_decay": 2e-4,
    "augment.rotation": 0.0,
}
ON: dict[str, dict[str, Any]] = {
    "cifar10_lt": {"optim.decay_factor": 0.01},
    "cifar100_lt": {"optim.decay_factor": 0.01},
    "imagenet_lt": {
        "total_epochs": 100,
        "batch_size": 128,
        "optim.learning_rate": 0.1,
        "optim.schedule": "step",
        "optim.decay_epochs": (60, 80),
        "optim.warmup_epochs": 5,
    },
    "inaturalist2018": {
        "total_epochs": 200,
        "batch_size": 256,
        "optim.learning_rate": 0.1,
        "optim.schedule": "step",
        "optim.decay_epochs": (75, 160),
        "optim.warmup_epochs": 5,
    },
}
# Weights begin where the learning rate drops (for the last time on iNaturalist).
_DEFERRED = {
    **ON,
    "imagenet_lt": {**ON["imagenet_lt"], "method.reweight_epoch": 80},
    "inaturalist2018": {**ON["inaturalist2018"], "method.reweight_epoch": 160},
}
_LDAM = {
    **_DEFERRED,
    "inaturalist2018": {**_DEFERRED["inaturalist2018"], "method.max_margin": 0.3},
}
_LINEAR = {**TRAINING, "model.classifier": "linear"}

PRESETS = {
    "cross_entropy_cb": Preset(
        Reweighted(weights="class_balanced"),
        "class-balanced cross-entropy",
        fields=_LINEAR,
        on=ON,
    ),
    "ce_drw": Preset(
        Reweighted(weights="class_balanced", reweight_epoch=160),
        "cross-entropy, DRW",
        fields=_LINEAR,
        on=_DEFERRED,
    ),
    "focal": Preset(
        Reweighted("focal"),
        "focal loss",
        fields=_LINEAR,
        on=ON,
        published=(
            PublishedResult("cifar100_lt", "ir=100", 38.4, "quoted by later papers"),
            PublishedResult("cifar100_lt", "ir=10", 55.8, "quoted by later papers"),
            PublishedResult("inaturalist2018", "", 66.6, "quoted by later papers"),
        ),
    ),
    "focal_cb": Preset(
        Reweighted("focal", weights="class_balanced", weight_norm="batch", focal_p="weighted"),
        "class-balanced focal loss",
        fields=_LINEAR,
        on=ON,
    ),
    "ldam": Preset(
        Reweighted("ldam"),
        "LDAM",
        fields=TRAINING,
        on={**ON, "inaturalist2018": {**ON["inaturalist2018"], "method.max_margin": 0.3}},
    ),
    "ldam_drw": Preset(
        Reweighted("ldam", weights="class_balanced", reweight_epoch=160),
        "LDAM-DRW",
        fields=TRAINING,
        on=_LDAM,
        published=(
            PublishedResult("cifar100_lt", "ir=100", 42.04, "LDAM-DRW's paper"),
            PublishedResult("cifar100_lt", "ir=10", 58.71, "LDAM-DRW's paper"),
            PublishedResult("imagenet_lt", "backbone=resnext50", 51.1, "quoted by later papers"),
            PublishedResult("inaturalist2018", "", 68.6, "Remix's paper"),
        ),
    ),
}
