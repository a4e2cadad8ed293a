# SPDX-License-Identifier: Apache-2.0
"""SHIKE: experts of unequal depth that learn from each other, then new classifiers (Jin et al.,
CVPR 2023).

Each expert has a shallow path: strided convolutions from the output of a shared stage to the size
of its own last map. The two maps are multiplied before they are pooled. Paths begin at the shared
stages in turn, so that experts differ in depth.

In the first phase an expert's loss is a cross-entropy and two divergences. One draws the expert
towards the predictions of the others. The other one suppresses the hardest wrong class. Its target
is a softmax over wrong classes, of the mean logit of all experts for the hardest one, and of their
largest logit for any other. The second phase trains new classifiers alone by balanced softmax.

Followed is the authors' code (jinyan-06/SHIKE), which is for CIFAR. Losses are summed over experts.
Divergences are divided by the number of classes, and gradients flow to both of their sides. The
label's logit is -30 in an expert's softmax of wrong classes, and 0 in that of all together.
Statistics of BatchNorm move on in the second phase.

Where we differ: blocks that change the shape have a shortcut without parameters. The code's is a
convolution with BatchNorm, so that it has 1.26 million parameters, and ours 1.25. Frozen parameters
stay as they are. In the code they decay, which its cosine classifiers do not see.

For photographs neither paths nor training were published. Experts share three stages there, and are
trained as those of the other methods. The abstract has 60.3% on ImageNet-LT and 75.4% on
iNaturalist 2018, and does not name the network.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.losses import expert_losses, log_prior
from balpoe_jax.methods.augmentations import views
from balpoe_jax.methods.base import Context, ExpertLosses, Phase
from balpoe_jax.methods.classifier import cross_entropies, in_classifier, new_classifier
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.models import ExpertEnsemble
from balpoe_jax.models.layers import BatchNorm
from balpoe_jax.models.resnet_cifar import Conv3x3
from balpoe_jax.setting import setting

# The least logit of a cosine classifier of scale 30.
_SUPPRESSED = -30.0


class ShallowPath(nn.Module):
    """Strided convolutions with BatchNorm, from a stage's map to one of the last stage's size.

    Rectified are all, but for the last one of several.

    Attributes:
        channels: of each convolution's output.
        axis_name: the mapped axis over which BatchNorm takes its statistics.
        dtype: of the computations.
    """

    channels: Sequence[int]
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Float `[B, H, W, in]` -> `[B, H / 2^n, W / 2^n, out]`, each halving rounded up."""
        last = len(self.channels) - 1
        for i, channels in enumerate(self.channels):
            x = Conv3x3(channels, strides=(2, 2), dtype=self.dtype, name=f"conv{i}")(x)
            norm = BatchNorm(
                use_running_average=not train,
                axis_name=self.axis_name,
                dtype=self.dtype,
                name=f"bn{i}",
            )
            x = norm(x)
            if i < last or not last:
                x = nn.relu(x)
        return x


class ShallowPaths(nn.Module):
    """A path of its own for each expert.

    Attributes:
        paths: of the experts; the stages take turns as their beginnings.
    """

    paths: Sequence[ShallowPath]

    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        """The outputs of the shared stages -> float `[E, B, h, w, D]`."""
        return jnp.stack([path(maps[i % len(maps)], train) for i, path in enumerate(self.paths)])


def mutual_divergences(logits: jax.Array) -> jax.Array:
    """The sum over the others of `KL(other || own)` for each expert, float `[E, B]`.

    Args:
        logits: float `[E, B, C]`.
    """
    log_p = jax.nn.log_softmax(logits)
    # To the expert on the first axis, from that on the second.
    pairs = (jnp.exp(log_p)[None] * (log_p[None] - log_p[:, None])).sum(axis=-1)
    return pairs.sum(axis=1)


def hardest_negative_divergences(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How far each expert's wrong classes are from those of all together, float `[E, B]`.

    With `m` the mean logits over experts, the hardest wrong class is that of the largest `m`. All
    together have its `m`, of the other wrong classes the largest logit of any expert, and 0 for the
    label; an expert has its own logits, and -30 for the label. It is `KL(together || own)` of their
    softmaxes.

    Args:
        logits: float `[E, B, C]`, of cosine classifiers.
        labels: int `[B]`.
    """
    classes = logits.shape[-1]
    own = jax.nn.one_hot(labels, classes, dtype=bool)
    mean = logits.mean(axis=0)
    hardest = jnp.argmax(jnp.where(own, -jnp.inf, mean), axis=-1)
    is_hardest = jax.nn.one_hot(hardest, classes, dtype=bool)
    together = jnp.where(own, 0.0, jnp.where(is_hardest, mean, logits.max(axis=0)))
    log_q = jax.nn.log_softmax(together)[None]
    log_p = jax.nn.log_softmax(jnp.where(own[None], _SUPPRESSED, logits))
    return (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class SHIKE(ExpertLosses):
    """See the module."""

    total = "sum"
    supports_mixing = False

    distillation: float = setting(
        1.0, "Weight of the divergences from the other experts, over the number of classes.", 0, 1e6
    )
    suppression: float = setting(
        10.0,
        "Weight of the divergence on the wrong classes, over the number of classes.",
        0,
        1e6,
    )

    def expert_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """That of the second phase's balanced softmax."""
        return (1.0,) * len(taus)

    def network(self, ensemble: ExpertEnsemble, context: Context) -> ExpertEnsemble:
        """The ensemble with shallow paths.

        Raises:
            UserError (a `ValueError`): experts that share no stage.
        """
        trunk = ensemble.trunk
        channels = (*trunk.channels, *ensemble.expert.body.channels)
        shared = len(trunk.channels)
        if not shared:
            raise UserError(
                "SHIKE's experts share at least one stage, got none; set model.shared_stages to 1 "
                "or more."
            )
        make = partial(ShallowPath, axis_name=context.batch_norm_axis, dtype=trunk.dtype)
        paths = [make(channels[i % shared + 1 :]) for i in range(ensemble.num_experts)]
        return ensemble.clone(trunk=trunk.clone(all_stages=True), shallow=ShallowPaths(paths))

    def phases(self) -> tuple[Phase, ...]:
        """All but new classifiers, then these alone."""
        return (
            Phase("training", self.loss),
            Phase(
                "classifier re-training",
                partial(self.loss_of, self.balanced_losses),
                in_classifier,
                begin=lambda params, key, context: new_classifier(params, key),
            ),
        )

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies and both divergences."""
        mutual = self.distillation * mutual_divergences(logits)
        hardest = self.suppression * hardest_negative_divergences(logits, batch.labels)
        return cross_entropies(logits, batch) + (mutual + hardest) / context.num_classes

    def balanced_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies of logits plus the log prior."""
        taus = jnp.ones(len(logits), logits.dtype)
        return expert_losses(logits, batch.labels, log_prior(context.class_counts), taus)


# The authors' rates rise in five epochs from a sixth of the largest, from 3/8 in the second phase.
# Then a cosine begins.
_WARMUP = {"schedule": "cosine_after_warmup", "warmup_epochs": 6}
_CIFAR = {
    "total_epochs": 180,
    "batch_size": 128,
    "optim.learning_rate": 0.15,
    "optim.decay_epochs": (),
    **{f"optim.{name}": value for name, value in _WARMUP.items()},
    **views("strong"),
}
_NETWORK = "ResNet-32, 3 experts of unequal depth (1.3 M)"

PRESETS = {
    "shike": Preset(
        SHIKE(),
        "SHIKE, experts of unequal depth",
        experts=3,
        fields={
            "model.shared_stages": 2,
            "optim.nesterov": False,
            "phase2.epochs": 20,
            "phase2.learning_rate": 0.1,
            "phase2.warmup_start": 0.25,
            **{f"phase2.{name}": value for name, value in _WARMUP.items()},
        },
        on={
            "cifar100_lt": _CIFAR,
            "cifar10_lt": _CIFAR,
            "imagenet_lt": {"model.shared_stages": 3},
            "inaturalist2018": {"model.shared_stages": 3},
        },
        epochs=180,
        published=(
            PublishedResult(
                "cifar100_lt", "ir=50", 59.8, "quoted by leaderboards", network=_NETWORK
            ),
            PublishedResult("cifar100_lt", "ir=100", 56.3, "SHIKE's abstract", network=_NETWORK),
        ),
    ),
}
