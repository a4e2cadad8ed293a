# SPDX-License-Identifier: Apache-2.0
"""GLMC: a mixup and a CutMix that agree, and class weights that grow with the epochs (Du et al.,
CVPR 2023).

Two views of an image are mixed with two of a partner from a second sampler, by one coefficient. The
first views are blended, the second ones get a box of the partner's pixels. From each mixture a
linear layer predicts the direction of the other one's projection (SimSiam, Chen and He, CVPR 2021).

Two classifiers learn from both mixtures by the cross-entropy of mixed labels. The second one weighs
each label by its class, and it alone predicts. The loss moves from the first to the second with the
square of the epoch.

Followed is the authors' code (ynu-yangpeng/GLMC). The coefficient is uniform, and is the label's
share even where the box is clipped. Each mixture passes the network by itself. Where we differ: the
sides of a box are rounded down, the code's up. Rates on photographs are PaCo's, and the code's come
an epoch later. MaxNorm in a second phase is left out.

Published figures on CIFAR are of a ResNet-32 with 64, 128 and 256 channels, which has 7.4 million
parameters. So has the preset's; `width=1` gives it the channels of the other methods. The figures
are those of the repository's update, whose images are not the field's selection. Its code keeps the
best epoch on the test images. The paper's own are of images drawn with replacement: 70.74, 61.08
and 55.88 on CIFAR-100-LT.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.methods.augmentations import views
from balpoe_jax.methods.base import Context, Losses, Method, Network, epochs
from balpoe_jax.methods.classifier import cross_entropies
from balpoe_jax.methods.contrastive import check_single
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.models import ExpertEnsemble
from balpoe_jax.models.heads import LinearHead, he_normal, normalize
from balpoe_jax.setting import setting


class GLMCOutputs(NamedTuple):
    """What the network returns.

    Attributes:
        logits: float `[1, B, C]`, of the classifier that predicts.
        features: float `[1, B, D]`.
        plain_logits: float `[1, B, C]`, of the other one.
        projections: float `[B, P]`.
        predictions: float `[B, P]`, of another mixture's projections.
    """

    logits: jax.Array
    features: jax.Array
    plain_logits: jax.Array
    projections: jax.Array
    predictions: jax.Array


class GLMCEnsemble(nn.Module):
    """One expert with a second classifier, a projection, and a prediction from that.

    Attributes:
        ensemble: of one expert, whose classifier predicts.
        plain: the second classifier.
        projection, prediction: linear layers.
    """

    ensemble: ExpertEnsemble
    plain: nn.Module
    projection: nn.Module
    prediction: nn.Module

    def __call__(self, images: jax.Array, train: bool) -> GLMCOutputs:
        """As the ensemble's, with what the other layers make of the features."""
        outputs = self.ensemble(images, train)
        features = outputs.features[0]
        projections = self.projection(features)
        return GLMCOutputs(
            outputs.logits,
            outputs.features,
            self.plain(features)[None],
            projections,
            self.prediction(projections),
        )


def disagreement(predictions: jax.Array, projections: jax.Array) -> jax.Array:
    """Minus the cosine of each prediction and another mixture's projection, float `[B]`.

    Args:
        predictions: float `[B, P]`.
        projections: float `[B, P]`, which gets no gradient.
    """
    targets = normalize(jax.lax.stop_gradient(projections), axis=-1)
    return -(normalize(predictions, axis=-1) * targets).sum(axis=-1)


def class_weights(class_counts: np.ndarray, power: float) -> np.ndarray:
    """Weights proportional to `n ** -power`, of mean 1, float64 `[C]`.

    Args:
        class_counts: int `[C]`, each at least 1.
        power: 0 for weights that are all 1.
    """
    # Relative to the smallest, so that no power overflows.
    weights = (np.asarray(class_counts, np.float64) / np.min(class_counts)) ** -power
    return weights / weights.mean()


@dataclasses.dataclass(frozen=True)
class GLMC(Method):
    """See the module."""

    views = 2
    mixed_views = 2

    consistency: float = setting(4.0, "Weight of the disagreement of the two mixtures.", 0, 1e6)
    reweighting: float = setting(
        1.2, "Power of a class's count to which its weight is inversely proportional.", 0, 10
    )
    width: int = setting(128, "Width of the projections.", 1, 1e6)
    cumulative_epochs: int = epochs(
        200, "Number of epochs over which the loss moves to the weighted classifier.", 1
    )

    def network(self, ensemble: ExpertEnsemble, context: Context) -> GLMCEnsemble:
        """The expert with its projections and second classifier."""
        check_single(ensemble, "GLMC")
        head = ensemble.expert.head
        init = head.kernel_init if isinstance(head, LinearHead) else he_normal
        layers = [LinearHead(self.width, init) for _ in range(2)]
        return GLMCEnsemble(ensemble, head.clone(), *layers)

    def loss(
        self, network: Network, method_state: Any, batch: TrainBatch, context: Context
    ) -> Losses:
        """The sum over both mixtures of the mean over rows."""
        first, batch_stats = network(batch.views[0])
        second, batch_stats = dataclasses.replace(network, batch_stats=batch_stats)(batch.views[1])
        both = (first, second)
        weights = jnp.asarray(
            class_weights(context.class_counts, self.reweighting), first.logits.dtype
        )
        plain = jnp.stack([cross_entropies(x.plain_logits, batch).mean() for x in both]).sum()
        weighted = jnp.stack([cross_entropies(x.logits, batch, weights).mean() for x in both]).sum()
        apart = (
            disagreement(first.predictions, second.projections).mean()
            + disagreement(second.predictions, first.projections).mean()
        )
        moved = jnp.square(context.epoch / self.cumulative_epochs)
        supervised = (1 - moved) * plain + moved * weighted
        terms = {"plain": plain, "weighted": weighted, "disagreement": apart}
        total = supervised + self.consistency * apart
        return Losses(total, supervised[None], batch_stats, method_state, terms)


def _of_ratio(power: float, weight: float, consistency: float) -> dict[str, Any]:
    """The fields of a ratio.

    Args:
        power: of the second sampler's class odds: 1 for those of the first one.
        weight: the power of the weights.
        consistency: as the method's.
    """
    return {
        "mix.sampling_power": power,
        "method.reweighting": weight,
        "method.consistency": consistency,
    }


_CIFAR = {
    "model.width": 4,
    "batch_size": 64,
    "optim.learning_rate": 0.01,
    "optim.weight_decay": 5e-3,
    "optim.schedule": "cosine",
    "optim.decay_epochs": (),
    "optim.warmup_epochs": 0,
    **views("basic", "basic"),
}
_PHOTOS = {
    **_of_ratio(0.8, 1.0, 10.0),
    "method.width": 256,
    "optim.learning_rate": 0.1,
    "optim.schedule": "cosine_after_warmup",
    "optim.warmup_epochs": 10,
    **views("photo_similar", "photo_similar"),
}
_LARGE = "GLMC's repository"

PRESETS = {
    "glmc": Preset(
        GLMC(),
        "GLMC, mixtures that agree",
        fields={
            "model.classifier": "linear",
            "optim.nesterov": False,
            "mix.alpha": 1.0,
            "mix.rule": "mixup_and_cutmix",
            "mix.partners": "sampler",
            "mix.sampling_power": 1.0,
        },
        on={
            "cifar100_lt": _CIFAR,
            "cifar100_lt:ir=50": _of_ratio(0.8, 1.2, 6.0),
            "cifar100_lt:ir=10": _of_ratio(0.8, 1.2, 4.0),
            "cifar10_lt": {**_CIFAR, "method.consistency": 1.0},
            "cifar10_lt:ir=10": _of_ratio(0.8, 1.0, 2.0),
            "imagenet_lt": {
                **_PHOTOS,
                "total_epochs": 135,
                "method.cumulative_epochs": 135,
                "batch_size": 120,
                "optim.weight_decay": 2e-4,
            },
            "inaturalist2018": {
                **_PHOTOS,
                "total_epochs": 120,
                "method.cumulative_epochs": 120,
                "batch_size": 128,
                "optim.weight_decay": 1e-4,
            },
        },
        published=(
            *(
                PublishedResult(data, f"ir={ratio}", accuracy, _LARGE)
                for data, accuracies in (
                    ("cifar10_lt", (94.87, 91.04, 88.50)),
                    ("cifar100_lt", (73.40, 63.78, 57.97)),
                )
                for ratio, accuracy in zip((10, 50, 100), accuracies, strict=True)
            ),
            PublishedResult("imagenet_lt", "backbone=resnext50", 56.3, _LARGE),
            PublishedResult("inaturalist2018", "backbone=resnext50", 72.21, _LARGE),
        ),
    ),
}
