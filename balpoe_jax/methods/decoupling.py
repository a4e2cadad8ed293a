# SPDX-License-Identifier: Apache-2.0
"""Decoupled training: cRT re-trains the classifier, LWS scales it (Kang et al., ICLR 2020).

The first phase is cross-entropy on batches as they come. The second one draws classes uniformly and
keeps the features, BatchNorm's averages included. cRT trains a new classifier on them. LWS keeps
the classifier and learns a factor for each class, 1 at first, by which its logit is multiplied,
bias included.

The training on ImageNet-LT follows the paper and was not compared with the authors' code. Two
points are uncertain: the rate of its second phase, taken to be that of the first, and whether
BatchNorm's averages stay. None was published for CIFAR, nor for iNaturalist's second phase. There
the first phase is that of the other methods, and the second one has 10 epochs.
"""

import dataclasses
from functools import partial
from typing import Any

import jax

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.methods.base import Context, ExpertLosses, Phase
from balpoe_jax.methods.classifier import cross_entropies, in_classifier, new_classifier
from balpoe_jax.methods.mislas import ScaledEnsemble
from balpoe_jax.methods.preset import Preset
from balpoe_jax.models import ExpertEnsemble


@dataclasses.dataclass(frozen=True)
class _Decoupled(ExpertLosses):
    """The loss of both methods; in their second phase BatchNorm uses its averages."""

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies."""
        return cross_entropies(logits, batch)

    @property
    def loss_of_features(self) -> Any:
        """The loss with features that do not change, BatchNorm's averages included."""
        return partial(self.loss_of, self.expert_losses, train=False)


@dataclasses.dataclass(frozen=True)
class CRT(_Decoupled):
    """Classifier re-training, see the module."""

    def phases(self) -> tuple[Phase, ...]:
        """Training of the whole network, then of a new classifier."""
        return (
            Phase("training", self.loss),
            Phase(
                "classifier re-training",
                self.loss_of_features,
                in_classifier,
                begin=lambda params, key, context: new_classifier(params, key),
            ),
        )


@dataclasses.dataclass(frozen=True)
class LWS(_Decoupled):
    """Learnable weight scaling, see the module."""

    def network(self, ensemble: ExpertEnsemble, context: Context) -> ScaledEnsemble:
        """The ensemble with a scale for each class."""
        return ScaledEnsemble(ensemble)

    def phases(self) -> tuple[Phase, ...]:
        """Training of everything except the scales, then of the scales."""
        return (
            Phase("training", self.loss, lambda path: path != "class_scale"),
            Phase("scaling", self.loss_of_features, lambda path: path == "class_scale"),
        )


_FIELDS = {
    "model.classifier": "linear",
    "optim.nesterov": False,
    "augment.rotation": 0.0,
    "phase2.epochs": 10,
    "phase2.learning_rate": 0.1,
    "phase2.sampler": "class_balanced",
}
_ON: dict[str, dict[str, Any]] = {
    "imagenet_lt": {
        "total_epochs": 90,
        "batch_size": 512,
        "optim.learning_rate": 0.2,
        "phase2.learning_rate": 0.2,
    },
}

PRESETS = {
    "crt": Preset(CRT(), "cRT, a re-trained classifier", fields=_FIELDS, on=_ON),
    "lws": Preset(LWS(), "LWS, a scaled classifier", fields=_FIELDS, on=_ON),
}
