# SPDX-License-Identifier: Apache-2.0
"""BCL: balanced contrastive learning next to balanced softmax (Zhu et al., CVPR 2022).

The contrastive loss averages over each class before it sums over classes, and gives every class a
prototype, so that a batch contrasts all of them, whatever it holds. Prototypes are projections of
the classifier's weights, by a head of their own.

We follow the authors' code (FlamieZhu/Balanced-Contrastive-Learning) as far as it runs. None was
published for CIFAR, whose recipe combines two re-implementations (sumyeongahn/CUDA_LTR and
YuMJie/ConCutMix). Where we differ: prototypes are made of all rows of the classifier on every
device, and a linear classifier has them, too, whose weights the code transposes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import log_prior, logit_adjusted_cross_entropy
from balpoe_jax.methods.augmentations import views
from balpoe_jax.methods.base import Context, Losses, Method, Network
from balpoe_jax.methods.contrastive import ProjectedEnsemble, Projection, check_single
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.models import ExpertEnsemble
from balpoe_jax.setting import setting


def balanced_contrastive_loss(
    features: jax.Array, labels: jax.Array, prototypes: jax.Array, temperature: float
) -> jax.Array:
    """The loss of each feature against all others and the prototypes (paper, Eq. 7).

    The positives of a feature are the others of its class and the prototype. In the normaliser each
    class counts once: the mean exponential of its members, without the feature itself.

    Args:
        features: Features of length 1, float `[N, P]`.
        labels: Classes of the features, int `[N]`.
        prototypes: Prototypes of length 1, float `[C, P]`.
        temperature: Divisor of the similarities.

    Returns:
        float `[N]`, in nats.
    """
    number, classes = len(features), len(prototypes)
    one_hot = jax.nn.one_hot(labels, classes, dtype=features.dtype)
    members = jnp.concatenate([one_hot, jnp.eye(classes, dtype=features.dtype)])  # [N + C, C]
    everything = jnp.concatenate([features, prototypes])
    similarities = (
        jnp.matmul(features, everything.T, precision=jax.lax.Precision.HIGHEST) / temperature
    )
    apart = 1.0 - jnp.eye(number, len(everything), dtype=features.dtype)
    largest = jax.lax.stop_gradient(similarities.max(axis=1, keepdims=True))
    # The number of each class's members without the feature itself.
    sizes = members.sum(axis=0)[None] - one_hot
    sums = jnp.matmul(
        jnp.exp(similarities - largest) * apart, members, precision=jax.lax.Precision.HIGHEST
    )
    log_total = jnp.log((sums / sizes).sum(axis=1)) + largest[:, 0]
    positives = jnp.matmul(one_hot, members.T) * apart
    count = positives.sum(axis=1)
    return log_total - (positives * similarities).sum(axis=1) / count


def contrast_views(
    projections: jax.Array,
    prototypes: jax.Array,
    batch: TrainBatch,
    temperature: float,
    context: Context,
) -> jax.Array:
    """The mean contrastive loss of the second and the third view of the whole batch, a scalar.

    Args:
        projections: float `[3 b, P]`, of length 1, of this device's views one after the other.
        prototypes: float `[C, P]`, of length 1.
        batch: This device's rows, of whose labels the first are meant.
        temperature: Divisor of the similarities.
        context: Context of the step.
    """
    views = [context.gather(x) for x in jnp.split(projections[len(batch.labels) :], 2)]
    labels = jnp.tile(context.gather(batch.labels), 2)
    losses = balanced_contrastive_loss(jnp.concatenate(views), labels, prototypes, temperature)
    return losses.mean()


@dataclasses.dataclass(frozen=True)
class BCL(Method):
    """See the module.

    The first view is classified; the second and the third are contrasted. All go through the
    network at once.
    """

    views = 3
    needs_global_batch = True
    supports_mixing = False

    classification: float = setting(2.0, "Weight of the classification loss.", 0, 1e6)
    contrast: float = setting(0.6, "Weight of the contrastive loss.", 0, 1e6)
    temperature: float = setting(0.1, "Divisor of the similarities.", 1e-6, 1e6)
    hidden: int = setting(512, "Width of the projections' hidden layer.", 1, 1e6)
    width: int = setting(128, "Width of the projections.", 1, 1e6)

    def expert_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """The classifier is balanced softmax."""
        return (1.0,) * len(taus)

    def network(self, ensemble: ExpertEnsemble, context: Context) -> ProjectedEnsemble:
        """The expert with two projection heads, of features and of classes."""
        check_single(ensemble, "BCL")
        axis = context.batch_norm_axis
        heads = (Projection((self.hidden,), self.width, True, axis) for _ in range(2))
        return ProjectedEnsemble(ensemble, *heads)

    def loss(
        self, network: Network, method_state: dict, batch: TrainBatch, context: Context
    ) -> Losses:
        """The weighted sum of the mean losses of classification and contrast, over the batch."""
        rows = len(batch.labels)
        outputs, batch_stats = network(jnp.concatenate(batch.views))
        labels = context.gather(batch.labels)
        classified = logit_adjusted_cross_entropy(
            context.gather(outputs.logits[0, :rows]), labels, log_prior(context.class_counts), 1.0
        ).mean()
        contrasted = contrast_views(
            outputs.projections, outputs.prototypes, batch, self.temperature, context
        )
        total = self.classification * classified + self.contrast * contrasted
        terms = {"classification": classified, "contrast": contrasted}
        return Losses(total, classified[None], batch_stats, method_state, terms)


_CIFAR = {
    "batch_size": 256,
    "optim.learning_rate": 0.15,
    "model.classifier": "linear",
    **views("strong", "similar", "similar"),
}
_PHOTOS = {
    "batch_size": 256,
    "optim.learning_rate": 0.1,
    "optim.schedule": "cosine_after_warmup",
    "method.classification": 1.0,
    "method.contrast": 0.35,
    "method.temperature": 0.07,
    "method.hidden": 2048,
    "method.width": 1024,
    **views("rand", "photo_turned", "photo_turned"),
}
_PAPER = "BalPoE's Table 1"

PRESETS = {
    "bcl": Preset(
        BCL(),
        "BCL",
        fields={"optim.nesterov": False},
        on={
            "cifar10_lt": _CIFAR,
            "cifar100_lt": _CIFAR,
            "cifar100_lt:recipe=long": {
                "total_epochs": 400,
                "optim.decay_epochs": (360, 380),
                "optim.warmup_epochs": 10,
            },
            "imagenet_lt": {**_PHOTOS, "total_epochs": 90},
            "inaturalist2018": {
                **_PHOTOS,
                "total_epochs": 100,
                "optim.learning_rate": 0.2,
                "optim.weight_decay": 1e-4,
            },
        },
        published=(
            PublishedResult("cifar100_lt", "ir=10", 64.9, _PAPER),
            PublishedResult("cifar100_lt", "ir=50", 56.6, _PAPER),
            PublishedResult("cifar100_lt", "ir=100", 51.9, _PAPER),
            PublishedResult("cifar100_lt", "ir=100,recipe=long", 53.9, _PAPER),
            PublishedResult("imagenet_lt", "", 56.0, _PAPER),
            PublishedResult("imagenet_lt", "backbone=resnext50", 57.1, _PAPER),
            PublishedResult("inaturalist2018", "", 71.8, _PAPER),
        ),
    ),
}
