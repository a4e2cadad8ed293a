# SPDX-License-Identifier: Apache-2.0
"""Post-hoc logit adjustment: trained as cross-entropy, the prior taken out of what is predicted
(Menon et al., ICLR 2021).

Predicted is `argmax_c z_c - tau log pi_c`. With `tau = 1` and a known target
prior, whose logarithm evaluation adds, it is post-compensated (PC) softmax of Hong et al. (CVPR
2021), `z - log pi + log pi_target`: before the softmax, since the two do not commute. The released
code of the latter scores nothing but compensated logits; with `tau = 0` ours are plain. Its
training is LADE's, with the same differences; that on ImageNet-LT is of 90 epochs.

`recipe=long` is the training of Menon et al.'s code, whose published figure is of another network
than ours. Its blocks are of 1x1, 3x3 and 1x1 convolutions, its shortcuts strided convolutions, and
a BatchNorm comes last: 0.30 million parameters. Ours is the ResNet-32 of the other methods, 0.46
million. Its weight decay spares BatchNorm, its images are scaled to +-0.5 and not normalised, and
its warm-up rises by the step.
"""

import dataclasses

import jax
import jax.numpy as jnp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import expert_losses, log_prior
from balpoe_jax.methods import lade
from balpoe_jax.methods.base import Context, ExpertLosses, Prediction, soft_labels
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.models import Outputs
from balpoe_jax.setting import setting


@dataclasses.dataclass(frozen=True)
class PostHoc(ExpertLosses):
    """Cross-entropy; predicts adjusted logits, from which all of an evaluation starts."""

    tau: float = setting(1.0, "Factor of the log prior that is taken out.", -100, 100)

    def expert_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """What is predicted is biased as by a loss of that tau."""
        return (self.tau,) * len(taus)

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies."""
        targets = soft_labels(batch, context.num_classes)
        return expert_losses(
            logits, targets, log_prior(context.class_counts), jnp.zeros(len(logits))
        )

    def predict(self, outputs: Outputs, params: object, context: Context) -> Prediction:
        """Every expert's logits without the prior."""
        prior = log_prior(context.class_counts)
        return Prediction(outputs.logits - self.tau * prior.reshape(1, 1, -1))


PRESETS = {
    "logit_adjustment": Preset(
        PostHoc(),
        "logit adjustment, post-hoc",
        fields={
            "optim.weight_decay": 2e-4,
            "augment.rotation": 0.0,
            "model.classifier": "linear",
        },
        # The authors' own training, of 120,000 updates.
        on={
            "cifar100_lt:recipe=long": {
                "total_epochs": 1419,
                "optim.decay_epochs": (691, 1059, 1290),
                "optim.decay_factor": 0.1,
                "optim.warmup_epochs": 22,
                "augment.crop_padding": 2,
                "augment.policy": "none",
            }
        },
        published=(
            PublishedResult(
                "cifar100_lt",
                "ir=100,recipe=long",
                44.07,
                "logit adjustment's repository",
                network="not ours, a bottleneck ResNet of 0.30 million parameters",
            ),
        ),
    ),
    "pc_softmax": Preset(
        PostHoc(),
        "PC softmax",
        fields=lade.TRAINING,
        on={
            **lade.ON,
            "imagenet_lt": {
                "total_epochs": 90,
                "batch_size": 256,
                "optim.learning_rate": 0.2,
            },
        },
        published=(
            PublishedResult("cifar100_lt", "ir=50,backbone=resnet32_bbn", 49.5, "LADE's paper"),
            PublishedResult("cifar100_lt", "ir=100,backbone=resnet32_bbn", 45.3, "LADE's paper"),
        ),
    ),
}
