# SPDX-License-Identifier: Apache-2.0
"""PaCo: contrast with class centres and with images in one softmax (Cui et al., ICCV 2021).

An image's positives are the classifier's logit of its class, with the training prior, and the
images of its class among the batch and a queue of earlier ones, which a moving average of the
network has encoded. GPaCo (Cui et al., TPAMI 2023) does without that second network. It contrasts
both views of an image, encodes each in a pass of its own, and keeps its own projections of second
views in the queue.

Followed is the authors' code (dvlab-research/Parametric-Contrastive-Learning). Its script for CIFAR
has an option for a cosine and does not read it: the rate drops in steps. Where we differ:

- The queue begins with noise of length 1 that has no label; the code's is normalised along the
  other axis and has random labels, so that its first steps have wrong positives.
- Statistics of BatchNorm are those of the global batch, which makes the code's shuffling of images
  between devices needless.
- The whole batch is contrasted. With several GPUs the code contrasts the images of each GPU, and
  the queue.
- On CIFAR the warm-up ends with its tenth epoch; the code's has an eleventh, at 1.1 times the rate.

Runs from before GPaCo had a queue have `queue_without_momentum` and `passes_by_view` off, and go on
with `--config.method.FIELD=False` for both.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import log_prior
from balpoe_jax.methods.augmentations import views
from balpoe_jax.methods.base import Context, Losses, Method, Network
from balpoe_jax.methods.contrastive import (
    ProjectedEnsemble,
    Projection,
    check_single,
    encode_keys,
    enqueue,
    equal_labels,
    init_momentum_encoder,
    update_momentum_encoder,
)
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.models import ExpertEnsemble
from balpoe_jax.models.heads import INITIALISERS, normalize
from balpoe_jax.setting import setting

_EPSILON = 1e-12  # within the logarithm, after the largest term was made 1


def paco_loss(
    logits: jax.Array,
    similarities: jax.Array,
    labels: jax.Array,
    others: jax.Array,
    log_prior: jax.Array,
    alpha: float,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> jax.Array:
    """The parametric contrastive loss of each image.

    With `s` the logits plus log prior, `t` the similarities and `D = sum exp(s) + gamma sum exp(t)`
    over all classes and all other images, it is minus the weighted mean of `s_y - log D` (weight
    `beta`) and of `t_a - log D` over the other images of the class (weight `alpha` each).

    Args:
        logits: float `[B, C]`, raw.
        similarities: float `[B, A]`, divided by the temperature. The first B of the others are the
            images themselves, of which each is none of its own others.
        labels: int `[B]`.
        others: int `[A]`, labels of the others; -1 for none.
        log_prior: float `[C]`.
        alpha, beta, gamma: as above.

    Returns:
        float `[B]`. With `alpha = gamma = 0` it is the logit-adjusted cross-entropy.
    """
    batch = len(logits)
    adjusted = logits + log_prior.astype(logits.dtype)[None]
    apart = 1.0 - jnp.eye(batch, len(others), dtype=logits.dtype)
    largest = jax.lax.stop_gradient(
        jnp.maximum(adjusted.max(axis=1), jnp.where(apart > 0, similarities, -jnp.inf).max(axis=1))
    )[:, None]
    sums = jnp.exp(adjusted - largest).sum(axis=1)
    # Of oneself no exponential is taken: it might overflow.
    terms = jnp.exp(jnp.where(apart > 0, similarities - largest, 0.0)) * apart
    log_total = jnp.log(sums + gamma * terms.sum(axis=1) + _EPSILON) + largest[:, 0]
    own = jnp.take_along_axis(adjusted, labels[:, None], axis=1)[:, 0]
    positives = equal_labels(labels, others).astype(logits.dtype) * apart
    number = positives.sum(axis=1)
    centre = beta * (own - log_total)
    images = alpha * ((positives * similarities).sum(axis=1) - number * log_total)
    return -(centre + images) / (beta + alpha * number)


@dataclasses.dataclass(frozen=True)
class PaCo(Method):
    """See the module."""

    views = 2
    needs_global_batch = True
    supports_mixing = False

    alpha: float = setting(
        0.01, "Weight of each image of the same class, against 1 for the class centre.", 0, 1e6
    )
    temperature: float = setting(0.05, "Divisor of the similarities.", 1e-6, 1e6)
    width: int = setting(32, "Width of the projections.", 1, 1e6)
    queue_size: int = setting(
        1024, "Number of earlier images that are contrasted, the most recent ones.", 1, 1e9
    )
    momentum: float = setting(
        0.999,
        "Momentum of the moving average that encodes them; 0 for none, which makes it GPaCo.",
        0,
        1,
    )
    queue_without_momentum: bool = setting(
        False,
        "Whether there is a queue without a momentum too, of the network's own projections.",
    )
    passes_by_view: bool = setting(
        False,
        "Whether without a momentum each view has a pass of its own, so that BatchNorm takes the "
        "statistics of each view by itself.",
    )
    projection_init: str = setting(
        "torch",
        "Initial values of the projection's last layer: PyTorch's, or He's.",
        choices=tuple(INITIALISERS),
    )

    def expert_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """The centre is adjusted as by tau 1."""
        return (1.0,) * len(taus)

    def network(self, ensemble: ExpertEnsemble, context: Context) -> nn.Module:
        """The expert with a projection: a hidden layer with BatchNorm, or GPaCo's two without."""
        check_single(ensemble, "PaCo")
        hidden = (0,) if self.momentum else (0, 0)  # as wide as the features
        projection = Projection(
            hidden,
            self.width,
            bool(self.momentum),
            context.batch_norm_axis,
            INITIALISERS[self.projection_init],
        )
        return ProjectedEnsemble(ensemble, projection)

    def init_state(self, network: Network, context: Context, key: jax.Array) -> Any:
        """The slow network, a copy of the fast one, and a queue of noise without labels."""
        if not (self.momentum or self.queue_without_momentum):
            return {}
        noise = jax.random.normal(key, (self.queue_size, self.width))
        return {
            **(init_momentum_encoder(network) if self.momentum else {}),
            "queue": normalize(noise, axis=-1),
            "labels": jnp.full(self.queue_size, -1, jnp.int32),
        }

    def on_step_start(self, method_state: Any, params: Any, context: Context) -> Any:
        """The slow network moves before it encodes a batch."""
        if not self.momentum:
            return method_state
        return update_momentum_encoder(method_state, params, self.momentum)

    def loss(
        self, network: Network, method_state: Any, batch: TrainBatch, context: Context
    ) -> Losses:
        """The mean over the images of the whole batch."""
        step = self._with_slow_network if self.momentum else self._with_both_views
        return step(network, method_state, batch, context)

    def _with_slow_network(
        self, network: Network, method_state: Any, batch: TrainBatch, context: Context
    ) -> Losses:
        outputs, batch_stats = network(batch.images)
        encoded, slow_stats = encode_keys(network, method_state, batch.views[1], context)
        keys, labels = (
            context.gather_state(encoded.projections),
            context.gather_state(batch.labels),
        )
        queries = context.gather(outputs.projections)
        others = jnp.concatenate([labels, labels, method_state["labels"]])
        contrasts = jnp.concatenate([queries, keys, method_state["queue"]])
        by_image = self._by_image(
            context, context.gather(outputs.logits[0]), queries, contrasts, others
        )
        new = {"params": method_state["params"], "batch_stats": slow_stats}
        return _losses(by_image, batch_stats, new | _enqueued(keys, labels, method_state))

    def _with_both_views(
        self, network: Network, method_state: Any, batch: TrainBatch, context: Context
    ) -> Losses:
        (logits, projections), batch_stats = self._encode_views(network, batch)
        all_logits, queries = (
            jnp.concatenate([context.gather(view) for view in views])
            for views in (logits, projections)
        )
        labels = context.gather_state(batch.labels)
        contrasts, others = queries, jnp.tile(labels, 2)
        if self.queue_without_momentum:
            contrasts = jnp.concatenate([contrasts, method_state["queue"]])
            others = jnp.concatenate([others, method_state["labels"]])
            keys = context.gather_state(projections[1])
            method_state = _enqueued(keys, labels, method_state)
        by_image = self._by_image(context, all_logits, queries, contrasts, others)
        return _losses(by_image, batch_stats, method_state)

    def _encode_views(
        self, network: Network, batch: TrainBatch
    ) -> tuple[tuple[list[jax.Array], list[jax.Array]], Any]:
        """Logits `[b, C]` and projections `[b, P]`, each by view, and the new statistics."""
        if not self.passes_by_view:
            outputs, batch_stats = network(jnp.concatenate(batch.views))
            return (jnp.split(outputs.logits[0], 2), jnp.split(outputs.projections, 2)), batch_stats
        logits, projections = [], []
        for view in batch.views:
            outputs, batch_stats = network(view)
            network = dataclasses.replace(network, batch_stats=batch_stats)
            logits.append(outputs.logits[0])
            projections.append(outputs.projections)
        return (logits, projections), network.batch_stats

    def _by_image(
        self,
        context: Context,
        logits: jax.Array,
        queries: jax.Array,
        contrasts: jax.Array,
        others: jax.Array,
    ) -> jax.Array:
        similarities = (
            jnp.matmul(queries, contrasts.T, precision=jax.lax.Precision.HIGHEST) / self.temperature
        )
        prior = log_prior(context.class_counts)
        return paco_loss(logits, similarities, others[: len(logits)], others, prior, self.alpha)


def _enqueued(keys: jax.Array, labels: jax.Array, method_state: Any) -> dict[str, jax.Array]:
    """The queue and its labels with those of a batch in front."""
    return {
        "queue": enqueue(keys, method_state["queue"]),
        "labels": enqueue(labels, method_state["labels"]),
    }


def _losses(by_image: jax.Array, batch_stats: Any, method_state: Any) -> Losses:
    total = by_image.mean()
    return Losses(total, total[None], batch_stats, method_state)


_LENGTH = {"total_epochs": 400, "optim.warmup_epochs": 10}
_CIFAR = {
    **_LENGTH,
    "optim.learning_rate": 0.05,
    "optim.schedule": "step",
    "optim.decay_epochs": (321, 361),
    "optim.decay_factor": 0.1,
    "model.classifier_init": "torch",
    "method.projection_init": "he",
    **views("strong", "similar"),
}
_GPACO_CIFAR = {**_CIFAR, "optim.learning_rate": 0.1, "view2.blur": 0.2}
_PHOTOS = {
    **_LENGTH,
    "batch_size": 128,
    "optim.learning_rate": 0.02,
    "optim.schedule": "cosine_after_warmup",
    "optim.decay_epochs": (),
    "method.alpha": 0.05,
    "method.temperature": 0.2,
    "method.width": 128,
    "method.queue_size": 8192,
    **views("rand", "photo_similar"),
}
_FIELDS = {"model.classifier": "linear", "optim.nesterov": False}
_PAPER, _CODE = "BalPoE's Table 1", "PaCo's repository"

PRESETS = {
    "paco": Preset(
        PaCo(),
        "PaCo",
        fields=_FIELDS,
        on={
            "cifar10_lt": _CIFAR,
            "cifar100_lt": _CIFAR,
            "imagenet_lt": _PHOTOS,
            "imagenet_lt:backbone=resnext50": {
                "method.temperature": 0.07,
                **views("stack", "photo_similar"),
            },
            "inaturalist2018": {**_PHOTOS, "optim.weight_decay": 1e-4},
        },
        epochs=400,
        published=(
            PublishedResult("cifar100_lt", "ir=10", 64.2, _PAPER),
            PublishedResult("cifar100_lt", "ir=50", 56.0, _PAPER),
            PublishedResult("cifar100_lt", "ir=100", 52.0, _PAPER),
            PublishedResult("imagenet_lt", "", 57.0, _PAPER),
            PublishedResult("imagenet_lt", "backbone=resnext50", 58.2, _PAPER),
            PublishedResult("inaturalist2018", "", 73.2, _PAPER),
        ),
    ),
    "gpaco": Preset(
        PaCo(momentum=0.0, queue_without_momentum=True, passes_by_view=True),
        "GPaCo",
        fields=_FIELDS,
        on={
            "cifar10_lt": _GPACO_CIFAR,
            "cifar100_lt": _GPACO_CIFAR,
            "imagenet_lt": {
                **_PHOTOS,
                "optim.learning_rate": 0.04,
                "method.alpha": 0.045,
                **views("rand", "stack"),
            },
            "imagenet_lt:backbone=resnext50": {
                "optim.learning_rate": 0.06,
                "method.alpha": 0.05,
                "augment.randaugment_layers": 3,
                "view2.randaugment_layers": 3,
            },
            "inaturalist2018": {
                **_PHOTOS,
                "optim.learning_rate": 0.04,
                "optim.weight_decay": 1e-4,
            },
        },
        epochs=400,
        published=(
            PublishedResult("imagenet_lt", "", 58.5, _CODE),
            PublishedResult("imagenet_lt", "backbone=resnext50", 58.9, _CODE),
            PublishedResult("inaturalist2018", "", 75.4, _CODE),
        ),
    ),
}
