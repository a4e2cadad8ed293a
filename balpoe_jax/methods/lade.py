# SPDX-License-Identifier: Apache-2.0
"""LADE: balanced softmax, regularised so that logits do not depend on the training prior (Hong et
al., CVPR 2021).

The paper is "Disentangling Label Distribution for Long-tailed Visual Recognition". The
regulariser (LADER) is a Donsker-Varadhan bound on how much logit `c` tells images of class `c` from
images under a uniform prior. Under such a prior an example counts `1 / (C pi_y)` times, by its own
label; the released code, from which the published figures are, takes the prior of the logit's class
in its place. That is a constant of each logit and no importance weight: it acts through the squared
term alone. Followed is the code.

Where we differ: rows may have two labels, of a mixed batch, which count by their shares. The code
moves its schedule before an epoch: the rate drops one epoch earlier than ours, in the 120th and the
160th of 200, and a cosine ends at 0.

The authors' CIFAR network is that of BBN, of 128 features in place of 64: `backbone=resnet32_bbn`
has it, and their figures are for it; without it the network is that of the other methods.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import expert_losses, log_prior
from balpoe_jax.methods.base import Context, Losses, Method, Network, soft_labels
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.setting import setting

_COUNT_EPSILON = 1e-8


def lade_regulariser(
    logits: jax.Array, targets: jax.Array, log_prior: jax.Array, square: float
) -> jax.Array:
    """`-sum_c pi_c (A_c - D_c - square * D_c^2)`, a scalar of the whole batch.

    `A_c` is the mean of logit `c` over the rows of class `c`, 0 if there are none, and `D_c` the
    logarithm of the mean over all rows of `exp(z_c)`, divided by `C pi_c`.

    Args:
        logits: float `[B, C]`.
        targets: float `[B, C]`, label distributions.
        log_prior: float `[C]`, see `losses.log_prior`.
        square: weight of the squared term.
    """
    rows, num_classes = logits.shape
    prior = log_prior.astype(logits.dtype)
    targets = targets.astype(logits.dtype)
    own = (targets * logits).sum(axis=0) / (targets.sum(axis=0) + _COUNT_EPSILON)
    everywhere = jax.nn.logsumexp(logits, axis=0) - prior
    everywhere -= jnp.log(num_classes) + jnp.log(rows)
    return -jnp.sum(jnp.exp(prior) * (own - everywhere - square * everywhere**2))


@dataclasses.dataclass(frozen=True)
class LADE(Method):
    """Balanced softmax plus `alpha` times the regulariser; the mean over experts if several."""

    alpha: float = setting(0.1, "Weight of the regulariser.", 0, 1e6)
    square: float = setting(
        0.01, "Weight of the squared term in the regulariser, the paper's lambda.", 0, 1e6
    )

    needs_global_batch = True

    def expert_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """Those of balanced softmax."""
        return (1.0,) * len(taus)

    def loss(
        self, network: Network, method_state: dict, batch: TrainBatch, context: Context
    ) -> Losses:
        """The mean over experts; the regulariser is that of the global batch."""
        outputs, batch_stats = network(batch.images)
        logits, prior = outputs.logits, log_prior(context.class_counts)
        targets = soft_labels(batch, context.num_classes)
        balanced = expert_losses(logits, targets, prior, jnp.ones(len(logits))).mean(axis=1)
        rows, all_targets = context.gather(logits.swapaxes(0, 1)), context.gather(targets)

        def regulariser(logits: jax.Array) -> jax.Array:
            return lade_regulariser(logits, all_targets, prior, self.square)

        regularisers = jax.vmap(regulariser, in_axes=1)(rows)
        by_expert = balanced + self.alpha * regularisers
        terms = {"balanced_softmax": balanced.mean(), "regulariser": regularisers.mean()}
        return Losses(by_expert.mean(), by_expert, batch_stats, method_state, terms)


# The authors' training, of PC softmax too but for its own on ImageNet-LT.
TRAINING: dict[str, Any] = {
    "optim.nesterov": False,
    "augment.rotation": 0.0,
    "model.classifier": "linear",
}
ON: dict[str, dict[str, Any]] = {
    "cifar100_lt": {
        "batch_size": 256,
        "optim.learning_rate": 0.2,
        "optim.decay_epochs": (120, 160),
        "optim.decay_factor": 0.01,
        "optim.warmup_start": 1 / 3,
        "model.classifier_init": "torch",
    },
    "imagenet_lt": {"total_epochs": 180, "batch_size": 256, "optim.learning_rate": 0.05},
    "inaturalist2018": {
        "total_epochs": 200,
        "batch_size": 256,
        "optim.learning_rate": 0.1,
        "optim.weight_decay": 1e-4,
    },
}
_PHOTOS = {"method.alpha": 0.05, "method.square": 0.5}

PRESETS = {
    "lade": Preset(
        LADE(),
        "LADE",
        fields=TRAINING,
        on={
            **ON,
            "imagenet_lt": {**ON["imagenet_lt"], **_PHOTOS},
            "inaturalist2018": {**ON["inaturalist2018"], **_PHOTOS},
        },
        published=(
            PublishedResult(
                "cifar100_lt", "ir=50,backbone=resnet32_bbn", 50.5, "LADE's repository"
            ),
            PublishedResult("cifar100_lt", "ir=100", 45.6, "BalPoE's Table 3"),
            PublishedResult("imagenet_lt", "backbone=resnext50", 52.3, "BalPoE's Table 3"),
            PublishedResult("inaturalist2018", "", 69.7, "quoted by later papers"),
        ),
    ),
}
