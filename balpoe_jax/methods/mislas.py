# SPDX-License-Identifier: Apache-2.0
"""MiSLAS: decoupled training that calibrates (Zhong et al., CVPR 2021).

The first phase is cross-entropy with mixup. The second one tunes the classifier on batches with
balanced classes, with label-aware smoothing and a learnable scale for each class, while the rest of
the network keeps its parameters and only its BatchNorm statistics move on ("shifted" statistics; on
CIFAR-10 they stay).

Followed is the authors' code (dvlab-research/MiSLAS), where the paper differs: the smoothed mass is
spread over all classes, not over the others alone, and the classifier of the first phase is
continued, not initialised again. Where we differ: an epoch of the second phase has as many steps as
one of the first, the authors' one more.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.methods.base import (
    Context,
    ExpertLosses,
    Phase,
    map_by_path,
    soft_labels,
)
from balpoe_jax.methods.classifier import in_classifier
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.models import ExpertEnsemble, Outputs
from balpoe_jax.optim import followed_by
from balpoe_jax.setting import setting

SHAPES = ("concave", "linear", "convex")


def label_smoothing(
    class_counts: npt.NDArray[np.int64], head: float, tail: float, shape: str = "concave"
) -> npt.NDArray[np.float64]:
    """How much the label of each class is smoothed, float64 `[C]`: `head` where most images are.

    With `t` from 0 for the smallest class to 1 for the largest, in proportion to the counts, it is
    `tail + (head - tail) s(t)`, `s` being `sin(pi t / 2)` ("concave"), `t` ("linear") or
    `1 + sin(3 pi / 2 + pi t / 2)` ("convex"). Paper, Section 3.2. If all classes have one size it
    is `head` for all.
    """
    counts = np.asarray(class_counts, np.float64)
    if counts.max() == counts.min():
        return np.full(len(counts), head)
    t = (counts - counts.min()) / (counts.max() - counts.min())
    curve = {
        "concave": np.sin(np.pi * t / 2),
        "linear": t,
        "convex": 1 + np.sin(3 * np.pi / 2 + np.pi * t / 2),
    }[shape]
    return tail + (head - tail) * curve


def label_aware_smoothing(logits: jax.Array, labels: jax.Array, smoothing: jax.Array) -> jax.Array:
    """Cross-entropy with labels smoothed by what their class asks for.

    Args:
        logits: float `[..., C]`.
        labels: int `[...]`.
        smoothing: float `[C]`, see `label_smoothing`; 0 is plain cross-entropy.

    Returns:
        float `[...]`, `(1 - s_y) (-log p_y) + s_y mean_c (-log p_c)`.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    share = smoothing[labels]
    return -(1 - share) * own - share * log_probabilities.mean(axis=-1)


class ScaledEnsemble(nn.Module):
    """An ensemble whose logits are multiplied by a learnable factor for each class, 1 at first."""

    ensemble: ExpertEnsemble

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Outputs:
        """As the ensemble's."""
        outputs = self.ensemble(images, train)
        scale = self.param("class_scale", nn.initializers.ones, outputs.logits.shape[-1:])
        return outputs._replace(logits=outputs.logits * scale[None, None])


@dataclasses.dataclass(frozen=True)
class Mislas(ExpertLosses):
    """See the module."""

    smooth_head: float = setting(0.4, "Smoothing of the largest class.", 0, 1)
    smooth_tail: float = setting(0.1, "Smoothing of the smallest class.", 0, 1)
    smooth_shape: str = setting(
        "concave", "Course of the smoothing between the two.", choices=SHAPES
    )
    classifier_rate: float = setting(
        0.2, "Factor of the classifier's learning rate in the second phase.", 0, 1e6
    )
    shift_statistics: bool = setting(
        True,
        "Whether BatchNorm takes the batch's statistics in the second phase, and its averages move "
        "on; else they stay.",
    )

    def network(self, ensemble: ExpertEnsemble, context: Context) -> ScaledEnsemble:
        """The ensemble with a scale for each class."""
        return ScaledEnsemble(ensemble)

    def phases(self) -> tuple[Phase, ...]:
        """Mixup training of all but the scales, then the classifier's tuning."""

        def first(path: str) -> bool:
            return path != "class_scale"

        def second(path: str) -> bool:
            return path == "class_scale" or (in_classifier(path) and self.classifier_rate > 0)

        tuning = partial(self.loss_of, self.tuning_losses, train=self.shift_statistics)
        return (
            Phase("mixup training", self.loss, first),
            Phase("classifier tuning", tuning, second, self.slower_classifier),
        )

    def slower_classifier(
        self, optimizer: optax.GradientTransformation, params: Any
    ) -> optax.GradientTransformation:
        """The optimizer, with the classifier's updates times `classifier_rate`."""
        labels = map_by_path(lambda path, _: "head" if in_classifier(path) else "rest", params)
        rates = {"head": optax.scale(self.classifier_rate), "rest": optax.identity()}
        return followed_by(optimizer, optax.partition(rates, labels))

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies of mixed labels."""
        targets = soft_labels(batch, context.num_classes)
        return -(targets[None] * jax.nn.log_softmax(logits)).sum(axis=-1)

    def tuning_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies of labels that are smoothed by their classes."""
        smoothing = label_smoothing(
            context.class_counts, self.smooth_head, self.smooth_tail, self.smooth_shape
        )
        labels = jnp.broadcast_to(batch.labels, logits.shape[:2])
        return label_aware_smoothing(logits, labels, jnp.asarray(smoothing, logits.dtype))


_SOURCE = "MiSLAS's repository"

_FIELDS = {
    "model.classifier": "linear",
    "optim.nesterov": False,
    "augment.rotation": 0.0,
    "phase2.epochs": 10,
    "phase2.learning_rate": 0.1,
    "phase2.nesterov": False,
    "phase2.sampler": "class_aware",
    "phase2.samples_per_class": 4,
}


def _recipe(about: str, cifar_decay: float, published: tuple[PublishedResult, ...]) -> Preset:
    decay = {"optim.weight_decay": cifar_decay, "phase2.weight_decay": cifar_decay}
    large = {
        "batch_size": 256,
        "optim.learning_rate": 0.1,
        "mix.alpha": 0.2,
        "method.smooth_head": 0.3,
        "method.smooth_tail": 0.0,
        "method.classifier_rate": 0.05,
    }
    softer = {"method.smooth_tail": 0.0, "method.classifier_rate": 0.1}
    on_cifar10 = {
        "mix.alpha": 1.0,
        **decay,
        "method.smooth_head": 0.3,
        "method.smooth_tail": 0.0,
        "method.classifier_rate": 0.5,
        "method.shift_statistics": False,
    }
    return Preset(
        Mislas(),
        about,
        fields=_FIELDS,
        on={
            "cifar100_lt": {"mix.alpha": 1.0, **decay},
            "cifar100_lt:ir=50": {**softer, "method.smooth_head": 0.3},
            "cifar100_lt:ir=10": {**softer, "method.smooth_head": 0.2},
            "cifar10_lt": on_cifar10,
            "cifar10_lt:ir=50": {"method.smooth_head": 0.2, "method.classifier_rate": 0.2},
            "cifar10_lt:ir=10": {"method.smooth_head": 0.1, "method.classifier_rate": 0.2},
            "digits_lt": {"mix.alpha": 0.4},
            "imagenet_lt": {**large, "total_epochs": 180},
            "inaturalist2018": {
                **large,
                "total_epochs": 200,
                "optim.weight_decay": 1e-4,
                "phase2.weight_decay": 1e-4,
                "augment.color_jitter": (0.4, 0.4, 0.4),
            },
        },
        published=published,
    )


PRESETS = {
    "mislas": _recipe(
        "MiSLAS",
        2e-4,
        (
            PublishedResult("cifar100_lt", "ir=10", 63.2, _SOURCE, ece=1.73),
            PublishedResult("cifar100_lt", "ir=50", 52.3, _SOURCE, ece=2.47),
            PublishedResult("cifar100_lt", "ir=100", 47.0, _SOURCE, ece=4.83),
            PublishedResult("imagenet_lt", "", 52.7, _SOURCE, ece=1.78),
            PublishedResult("imagenet_lt", "backbone=resnext50", 51.4, "BalPoE's Table 3"),
            PublishedResult("inaturalist2018", "", 71.6, _SOURCE, ece=7.67),
        ),
    ),
    # The weight decay that the authors' page recommends for CIFAR.
    "mislas_wd5e-4": _recipe("MiSLAS, more weight decay", 5e-4, ()),
}
