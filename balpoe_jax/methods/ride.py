# SPDX-License-Identifier: Apache-2.0
"""RIDE: experts on LDAM losses, rewarded for differing, and a router that skips some of them (Wang
et al., ICLR 2021).

The paper is "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts". We follow the
released code where it differs from the paper: experts are compared with the detached mean of all of
them instead of pairwise, and the divergence is multiplied by the square of the mean temperature.
The total is the sum over experts. Where we deliberately differ from that code:

- Without a diversity factor the experts keep their own losses. The code then takes the loss of the
  mean logits instead, once for each expert.
- Margins are scaled by the classifier's scale, whatever it is; the code's are always scaled by 30.
- The router is a second phase of one run, in place of a run of its own: until then it is frozen.
- The teacher sees images as in a test, by BatchNorm's averages. In the code it stays in training
  mode, and its predictions depend on the batch.

The loss of a distilled run is multiplied by the number of experts at the same weight decay, as in
that code and its published figures (`repeat_by_experts`). The router's sampler draws images of a
class with replacement; the code goes through them in turn. Classes are equally likely in both.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.losses import cross_entropy
from balpoe_jax.methods.base import (
    Context,
    Losses,
    Method,
    Network,
    Phase,
    Prediction,
    epochs,
)
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.methods.reweighting import Reweighted
from balpoe_jax.models import ExpertEnsemble, Outputs
from balpoe_jax.models.heads import LinearHead, normalize
from balpoe_jax.setting import setting


def class_temperatures(
    class_counts: npt.NDArray[np.integer], spread: float
) -> npt.NDArray[np.float64]:
    """`u / max(u)` with `u = C pi spread + 1 - spread`: 1 for the largest class, lower for others.

    Args:
        class_counts: int `[C]`.
        spread: in [0, 1]; 0 gives ones.

    Returns:
        float64 `[C]`.
    """
    counts = np.asarray(class_counts, np.float64)
    weights = len(counts) * counts / counts.sum() * spread + 1 - spread
    return weights / weights.max()


def divergence_from_mean(logits: jax.Array, temperatures: jax.Array) -> jax.Array:
    """`KL(softmax(mean / T) || softmax(expert / T)) * mean(T)^2`, the mean over rows.

    The mean of the experts' logits has no gradient.

    Args:
        logits: float `[E, B, C]`.
        temperatures: float `[C]`, one for each class's logit.

    Returns:
        float `[E]`, in nats.
    """
    temperatures = temperatures.astype(logits.dtype)
    scaled = logits / temperatures[None, None]
    target = jax.nn.log_softmax(jax.lax.stop_gradient(scaled.mean(axis=0)))
    difference = target[None] - jax.nn.log_softmax(scaled)
    divergence = (jnp.exp(target)[None] * difference).sum(axis=-1)
    return divergence.mean(axis=-1) * temperatures.mean() ** 2


def distillation(teacher: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    """`KL(softmax(teacher / T) || softmax(student / T)) * T^2`; the teacher has no gradient.

    Args:
        teacher: float `[B, C]`, mean logits of its experts.
        student: likewise.
        temperature: T.

    Returns:
        float `[B]`, in nats.
    """
    target = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    difference = target - jax.nn.log_softmax(student / temperature)
    return (jnp.exp(target) * difference).sum(axis=-1) * temperature**2


def prefix_means(logits: jax.Array) -> jax.Array:
    """The mean logits of the first `i + 1` experts at position `i`, float `[E, B, C]`."""
    numbers = jnp.arange(1, len(logits) + 1, dtype=logits.dtype)
    return jnp.cumsum(logits, axis=0) / numbers[:, None, None]


def router_labels(prefixes: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether a prefix of experts is wrong while a longer one is right, bool `[E - 1, B]`.

    Args:
        prefixes: float `[E, B, C]`, see `prefix_means`.
        labels: int `[B]`.
    """
    right = prefixes.argmax(axis=-1) == labels[None]
    # Whether this prefix or a longer one is right, from the longest to the shortest.
    later = jax.lax.cummax(right.astype(jnp.int32), axis=0, reverse=True) > 0
    return ~right[:-1] & later[1:]


class RoutedOutputs(NamedTuple):
    """What a `RoutedEnsemble` returns.

    Attributes:
        logits: float `[E, B, C]`.
        features: float `[E, B, D]`.
        gates: float `[E - 1, B]`; above 0 the next expert is asked.
    """

    logits: jax.Array
    features: jax.Array
    gates: jax.Array


class Router(nn.Module):
    """From what the experts so far say to whether the next one is worth asking.

    Attributes:
        top_k: how many of the largest mean logits it sees.
        width: of the projected feature.
    """

    top_k: int
    width: int

    @nn.compact
    def __call__(self, logits: jax.Array, features: jax.Array) -> jax.Array:
        """Logits `[E, B, C]` and features `[E, B, D]` -> gates `[E - 1, B]`."""
        top, _ = jax.lax.top_k(prefix_means(logits)[:-1], min(self.top_k, logits.shape[-1]))
        project = nn.vmap(  # each expert's feature by weights of its own
            lambda layer, features: layer(features),
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        layer = LinearHead(self.width, name="projection")
        hidden = nn.relu(project(layer, normalize(features[:-1], axis=-1)))
        return LinearHead(1, name="gate")(jnp.concatenate([top, hidden], axis=-1))[..., 0]


class RoutedEnsemble(nn.Module):
    """An ensemble and the router beside it; under `jit` all experts are computed either way."""

    ensemble: ExpertEnsemble
    router: Router

    def __call__(self, images: jax.Array, train: bool) -> RoutedOutputs:
        """As `ExpertEnsemble` does, with gates."""
        outputs = self.ensemble(images, train)
        return RoutedOutputs(*outputs, self.router(*outputs))


@dataclasses.dataclass(frozen=True)
class RIDE(Method):
    """The sum over experts of deferred LDAM losses plus `diversity` times their divergence."""

    diversity: float = setting(
        -0.45, "Factor of the divergence from the experts' mean; negative, a reward.", -1e3, 1e3
    )
    temperature: float = setting(1.0, "Divisor of the logits before they are compared.", 1e-3, 1e3)
    temperature_spread: float = setting(
        0.05,
        "Spread of the classes' temperatures from `reweight_epoch` on, see `class_temperatures`.",
        0,
        1,
    )
    reweight_epoch: int | None = epochs(
        160,
        "First epoch with class weights and temperatures, counted from 0; None for never.",
        0,
        1e6,
    )
    beta: float = setting(0.9999, "Base of the class weights' effective number.", 0, 1 - 1e-9)
    max_margin: float = setting(0.5, "Margin of the rarest class.", 0, 100)
    router: bool = setting(False, "Whether a router is trained in the second phase.")
    router_top_k: int = setting(
        30,
        "Number of logits that the router sees; the authors' 30 on CIFAR, 50 on photographs.",
        1,
        1e6,
    )
    router_width: int = setting(16, "Width of the feature that the router sees.", 1, 1e6)
    router_positive_weight: float = setting(
        100.0, "Weight of rows for which asking on is worth it.", 0, 1e9
    )
    distill: bool = setting(False, "Whether to learn from a teacher too.")
    teacher: str | None = setting(
        None, "Workdir of the run that trained it, such as one of `ride` with `experts=6`."
    )
    teacher_weight: float = setting(
        1.0, "Weight of the divergence from the teacher, see `distillation`.", 0, 1e6
    )
    teacher_temperature: float = setting(1.5, "Temperature of that divergence.", 1e-3, 1e3)
    repeat_by_experts: bool = setting(
        False,
        "Whether the loss of a distilled run is multiplied by the number of experts, as in the "
        "released code.",
    )

    needs_global_batch = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expert_loss  # noqa: B018  whose fields it checks

    @property
    def teacher_run(self) -> str:
        """Of the teacher, if there is one."""
        return (self.teacher or "") if self.distill else ""

    @property
    def expert_loss(self) -> Reweighted:
        """The loss that each expert has for itself."""
        return Reweighted(
            "ldam",
            weights="class_balanced",
            beta=self.beta,
            reweight_epoch=self.reweight_epoch,
            max_margin=self.max_margin,
        )

    def network(self, ensemble: ExpertEnsemble, context: Context) -> nn.Module:
        """The ensemble, with a router if there is to be one.

        Raises:
            UserError (a `ValueError`): a router for a single expert, or no teacher to learn from.
        """
        if self.distill and context.teacher is None:
            raise UserError(
                "Distillation needs a teacher: train one, such as method=ride,experts=6, and name "
                "its workdir with --config.method.teacher=DIR."
            )
        if not self.router:
            return ensemble
        if ensemble.num_experts < 2:
            raise UserError(
                "A router (config.method.router) chooses among experts: it needs at least 2, got "
                "1; raise config.model.num_experts."
            )
        return RoutedEnsemble(ensemble, Router(self.router_top_k, self.router_width))

    def phases(self) -> tuple[Phase, ...]:
        """The experts, and then the router with everything else frozen."""
        experts = Phase("experts", self.loss, lambda path: not path.startswith("router/"))
        router = Phase("router", self.router_loss, lambda path: path.startswith("router/"))
        return (experts, router) if self.router else (experts,)

    def loss(
        self, network: Network, method_state: dict, batch: TrainBatch, context: Context
    ) -> Losses:
        """The sum over experts, of means over rows."""
        outputs, batch_stats = network(batch.images)
        own, divergence = self.expert_and_diversity_losses(outputs.logits, batch, context)
        by_expert = own + self.diversity * divergence
        total, terms = by_expert.sum(), {"ldam": own.sum(), "divergence": divergence.sum()}
        if self.distill:
            terms["teacher"] = self.distillation_loss(outputs.logits, batch, context)
            total += self.teacher_weight * terms["teacher"]
            total *= len(by_expert) if self.repeat_by_experts else 1
        return Losses(total, by_expert, batch_stats, method_state, terms)

    def distillation_loss(
        self, logits: jax.Array, batch: TrainBatch, context: Context
    ) -> jax.Array:
        """The mean over rows of the divergence from the teacher, which sees them as in a test."""
        assert context.teacher is not None  # `network` has seen to it
        outputs, _ = context.teacher(batch.images, train=False)
        means = outputs.logits.mean(axis=0), logits.mean(axis=0)
        return distillation(*means, self.teacher_temperature).mean()

    def expert_and_diversity_losses(
        self, logits: jax.Array, batch: TrainBatch, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        """Each expert's own loss and its divergence from the mean, float `[E]`."""
        own = self.expert_loss.weighted_means(logits, batch, context)
        temperatures = jnp.ones(context.num_classes)
        if self.reweight_epoch is not None:
            later = jnp.asarray(class_temperatures(context.class_counts, self.temperature_spread))
            temperatures = jnp.where(context.epoch >= self.reweight_epoch, later, temperatures)
        return own, divergence_from_mean(logits, self.temperature * temperatures)

    def router_loss(
        self, network: Network, method_state: dict, batch: TrainBatch, context: Context
    ) -> Losses:
        """The binary cross-entropy of the gates, the mean over rows and gates.

        The experts see the images as in a test, BatchNorm's averages included, and their
        cross-entropies are shown.
        """
        outputs, batch_stats = network(batch.images, train=False)
        worth = router_labels(prefix_means(outputs.logits), batch.labels)
        losses = jnp.where(
            worth,
            self.router_positive_weight * jax.nn.softplus(-outputs.gates),
            jax.nn.softplus(outputs.gates),
        )
        by_expert = jax.vmap(lambda z: cross_entropy(z, batch.labels).mean())(outputs.logits)
        return Losses(losses.mean(), by_expert, batch_stats, method_state)

    def predict(
        self, outputs: Outputs | RoutedOutputs, params: object, context: Context
    ) -> Prediction:
        """The mean over the experts that the router asks, or over all."""
        if not isinstance(outputs, RoutedOutputs):
            return Prediction(outputs.logits)
        asked = jnp.cumprod((outputs.gates > 0).astype(jnp.int32), axis=0).sum(axis=0)
        chosen = jax.nn.one_hot(asked, len(outputs.logits), axis=0)[..., None]
        ensemble = (chosen * prefix_means(outputs.logits)).sum(axis=0)
        return Prediction(outputs.logits, ensemble, (asked + 1).astype(jnp.float32))


_CIFAR = {"optim.decay_factor": 0.01}
_PHOTOS = {
    "total_epochs": 100,
    "optim.schedule": "step",
    "optim.decay_epochs": (60, 80),
    "optim.warmup_epochs": 5,
    "optim.weight_decay": 2e-4,
    "method.diversity": -0.2,
    "method.reweight_epoch": 80,
    "method.router_top_k": 50,
}
_ON: dict[str, dict[str, Any]] = {
    "cifar10_lt": _CIFAR,
    "cifar100_lt": _CIFAR,
    "imagenet_lt": {
        **_PHOTOS,
        "batch_size": 256,
        "optim.learning_rate": 0.1,
        "method.temperature_spread": 0.02,
    },
    "inaturalist2018": {**_PHOTOS, "method.temperature_spread": 0.015},
}
_FIELDS: dict[str, Any] = {"model.reduce_dimension": True}
_PHASE2 = {
    "phase2.epochs": 5,
    "phase2.batch_size": 512,
    "phase2.learning_rate": 0.01,
    "phase2.schedule": "cosine",
    "phase2.weight_decay": 5e-4,
    "phase2.nesterov": True,
    "phase2.sampler": "class_balanced",
}

PRESETS = {
    "ride": Preset(
        RIDE(),
        "RIDE",
        experts=3,
        fields=_FIELDS,
        on=_ON,
        published=(
            PublishedResult("cifar100_lt", "ir=10", 61.8, "quoted by later papers"),
            PublishedResult("cifar100_lt", "ir=50", 51.7, "quoted by later papers"),
            PublishedResult("cifar100_lt", "ir=100", 48.0, "RIDE's paper"),
            PublishedResult("imagenet_lt", "backbone=resnet50", 54.9, "quoted by later papers"),
            PublishedResult("imagenet_lt", "backbone=resnext50", 56.3, "BalPoE's Table 3"),
            PublishedResult("inaturalist2018", "", 71.2, "RIDE's repository"),
        ),
    ),
    "ride_router": Preset(
        RIDE(router=True),
        "RIDE with router",
        experts=3,
        fields=_FIELDS | _PHASE2,
        on={**_ON, "digits_lt": {"phase2.batch_size": 32}},
        published=(PublishedResult("cifar100_lt", "ir=100", 48.6, "RIDE's repository"),),
    ),
    "ride_distill": Preset(
        RIDE(distill=True, repeat_by_experts=True),
        "RIDE, distilled",
        teacher=("ride", "experts=6"),
        experts=3,
        fields=_FIELDS,
        on={
            **_ON,
            "cifar10_lt": {**_CIFAR, "optim.warmup_epochs": 20},
            "cifar100_lt": {**_CIFAR, "optim.warmup_epochs": 20},
        },
        published=(
            PublishedResult("cifar100_lt", "ir=100", 49.0, "RIDE's repository"),
            PublishedResult("cifar100_lt", "ir=100,experts=4", 49.4, "RIDE's repository"),
            PublishedResult(
                "imagenet_lt", "backbone=resnext50,experts=4", 56.8, "RIDE's repository"
            ),
            PublishedResult("inaturalist2018", "experts=4", 72.6, "RIDE's repository"),
        ),
    ),
}
