# SPDX-License-Identifier: Apache-2.0
"""LOS: a classifier re-trained on extremely smoothed labels (Sun et al., ICLR 2025).

The first phase is cross-entropy. In the second one only the classifier learns, from ordinary
batches, with a target of `1 - delta + delta / C` for the label and `delta / C` for every other
class. With a delta of 0.98 and 100 classes, these are 0.03 and 0.01. Logits stay small, and as
large for rare classes as for common ones. No class counts are needed.

The preset `los` is the authors' code (bilibili/LOS) in delta and in the training on CIFAR. The
second phase continues the classifier of the first one, at a rate of 0.0005, and BatchNorm's
averages keep moving. For photographs the second phase is CIFAR's. The network is that of the other
methods; the code has a ResNet-34.

The preset `los_new` begins the second phase with a new classifier, as re-training does elsewhere
(cRT). Its rate of 0.1 is ours: at the code's rate a new classifier hardly moves in 20 epochs.

The published figure is that of a later paper, which trains the method by LOS's settings.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.methods.base import Context, ExpertLosses, Phase, mix_losses
from balpoe_jax.methods.classifier import cross_entropies, in_classifier, new_classifier
from balpoe_jax.methods.mislas import label_aware_smoothing
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.setting import setting


@dataclasses.dataclass(frozen=True)
class LOS(ExpertLosses):
    """See the module."""

    delta: float = setting(
        0.98, "Share of a label that is spread over all classes, in the second phase.", 0, 1
    )
    new_classifier: bool = setting(False, "Whether the second phase begins with a new classifier.")

    def phases(self) -> tuple[Phase, ...]:
        """Cross-entropy, then only the classifier on smoothed labels."""
        tuning = Phase(
            "classifier re-training",
            partial(self.loss_of, self.smoothed_losses),
            in_classifier,
            begin=self.begin,
        )
        return Phase("training", self.loss), tuning

    def begin(self, params: Any, key: jax.Array, context: Context) -> Any:
        """The parameters with a new classifier, if there is to be one."""
        return new_classifier(params, key) if self.new_classifier else params

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies."""
        return cross_entropies(logits, batch)

    def smoothed_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies of smoothed labels."""
        smoothing = jnp.full(context.num_classes, self.delta, logits.dtype)

        def losses(labels: jax.Array) -> jax.Array:
            return label_aware_smoothing(
                logits, jnp.broadcast_to(labels, logits.shape[:2]), smoothing
            )

        return mix_losses(batch, losses)


_CIFAR = {
    "batch_size": 64,
    "optim.learning_rate": 0.01,
    "optim.weight_decay": 5e-3,
    "optim.schedule": "cosine",
    "optim.decay_epochs": (),
    "optim.warmup_epochs": 0,
    "augment.rotation": 0.0,
}

_FIELDS = {
    "model.classifier": "linear",
    "optim.nesterov": False,
    "phase2.epochs": 20,
    "phase2.learning_rate": 5e-4,
    "phase2.weight_decay": 0.0,
}
_ON = {"cifar10_lt": _CIFAR, "cifar100_lt": _CIFAR}

_LATER = "trained again by Zhao et al., Deciphering the Extremes"

PRESETS = {
    "los": Preset(
        LOS(),
        "label over-smoothing",
        fields=_FIELDS,
        on=_ON,
        published=(PublishedResult("cifar100_lt", "ir=100", 53.92, _LATER, network="ResNet-34"),),
    ),
    "los_new": Preset(
        LOS(new_classifier=True),
        "label over-smoothing with a new classifier",
        fields={**_FIELDS, "phase2.learning_rate": 0.1},
        on=_ON,
    ),
}
