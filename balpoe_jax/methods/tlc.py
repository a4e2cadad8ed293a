# SPDX-License-Identifier: Apache-2.0
"""TLC: evidential experts that pass on what they are uncertain of (Li et al., CVPR 2022).

An expert's exponentiated logits are evidence for a Dirichlet distribution. Each expert after the
first learns only from the images that the experts before it are most uncertain of. Their opinions
are fused by Dempster's rule.

The losses follow the authors' code (lblaoke/TLC), with these differences:

- The combined output weighs experts by a softmax over the experts of each image. The code
  normalises the weights over the batch, so that a prediction depends on its batch and the softmax
  is nearly uniform.
- The prediction is the mean of the fused Dirichlet distribution, so that its confidence can be
  judged; its logarithm stands for the ensemble's logits. The code has no such probability, and its
  published calibration error cannot be computed from it.
- The divergence from the uniform distribution cancels in single precision, so that evidence is
  bounded there. Agreement has a lower bound, so that total conflicts do not divide by 0.
- The data are the usual ones. A later version of the code has other class sizes and one image too
  many, which shifts labels.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import class_balanced_weights, cross_entropy, ldam_margins
from balpoe_jax.methods.base import Context, Losses, Method, Network, Prediction, epochs
from balpoe_jax.methods.evidence import Opinion, agreement, divergence_from_uniform, fuse, opinion
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.methods.ride import class_temperatures
from balpoe_jax.models import Outputs
from balpoe_jax.setting import setting

# Bound of an expert's logits where the divergence of its evidence is computed.
_LARGEST_LOGIT = 15.0


def remaining_uncertainty(opinions: Opinion) -> jax.Array:
    """The uncertainty of each image before each expert sees it, float `[E, B]`; 1 at first.

    It is the product of the uncertainties so far, each divided by the agreement of the expert with
    the one before it.

    Args:
        opinions: Opinions of the experts, belief float `[E, B, C]`.
    """
    experts = _apart(opinions)
    remaining = [jnp.ones_like(experts[0].uncertainty)]
    for e, expert in enumerate(experts[:-1]):
        common = agreement(experts[e - 1], expert) if e else 1.0
        remaining.append(remaining[-1] * expert.uncertainty / common)
    return jnp.stack(remaining)


def fused(opinions: Opinion) -> Opinion:
    """The opinion of all experts together."""
    return functools.reduce(fuse, _apart(opinions))


def _apart(opinions: Opinion) -> list[Opinion]:
    return [Opinion(*each) for each in zip(*opinions, strict=True)]


@dataclasses.dataclass(frozen=True)
class TLC(Method):
    """See the module."""

    needs_global_batch = True
    supports_mixing = False

    engagement: float = setting(
        0.54,
        "Share of the batch's largest uncertainty above which an expert learns from an image.",
        0,
        1,
    )
    sharpness: float = setting(
        0.2, "Divisor of the remaining uncertainties before their softmax.", 1e-6, 1e6
    )
    kl_epochs: int = epochs(
        13200,
        "Number of epochs in which the weight of the divergence from uniform would grow to 1; the "
        "training ends long before.",
        1,
        1e9,
    )
    diversity: float = setting(
        0.01, "Weight of the reward for differing from the combined output.", 0, 1e6
    )
    reweight_epoch: int = epochs(
        160, "First epoch with class weights and temperatures, counted from 0.", 0, 1e6
    )
    temperature_spread: float = setting(
        0.05, "Spread of the classes' temperatures, see `ride.class_temperatures`.", 0, 1
    )
    beta: float = setting(0.9999, "Base of the class weights' effective number.", 0, 0.999999)
    max_margin: float = setting(0.5, "Margin of the rarest class, see `reweighting`.", 0, 100)

    def loss(
        self, network: Network, method_state: dict, batch: TrainBatch, context: Context
    ) -> Losses:
        """The sum over experts of their means over the images that they learn from."""
        outputs, batch_stats = network(batch.images)
        logits = jnp.moveaxis(context.gather(jnp.moveaxis(outputs.logits, 1, 0)), 1, 0)
        labels = context.gather(batch.labels)
        opinions = opinion(jnp.exp(jax.lax.stop_gradient(logits)))
        remaining = remaining_uncertainty(opinions)
        learns = remaining > self.engagement * remaining.max(axis=1, keepdims=True)
        by_row = self.row_losses(logits, labels, remaining, context)
        by_expert = (learns * by_row).sum(axis=1) / jnp.maximum(1, learns.sum(axis=1))
        shares = {f"engaged_{e + 1}": learns[e].mean() for e in range(1, len(learns))}
        return Losses(by_expert.sum(), by_expert, batch_stats, method_state, shares)

    def row_losses(
        self,
        logits: jax.Array,
        labels: jax.Array,
        remaining: jax.Array,
        context: Context,
    ) -> jax.Array:
        """Evidential loss, divergence from uniform and reward for diversity, float `[E, B]`."""
        dtype, counts = logits.dtype, context.class_counts
        later = context.epoch >= self.reweight_epoch

        def from_then_on(values: np.ndarray) -> jax.Array:
            return jnp.where(later, jnp.asarray(values, dtype), 1.0)

        one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=dtype)
        margins = jnp.asarray(ldam_margins(counts, self.max_margin) * context.scale, dtype)
        lowered = logits - (one_hot * margins[None])[None]
        weights = from_then_on(class_balanced_weights(counts, self.beta))[labels]
        # Minus the logarithm of the label's share of the evidence, which is cross-entropy.
        own = weights[None] * jax.vmap(cross_entropy, (0, None))(lowered, labels)
        evidence = jnp.exp(jnp.minimum(lowered, _LARGEST_LOGIT))
        uniform = divergence_from_uniform(1 + (1 - one_hot)[None] * evidence)
        temperatures = from_then_on(class_temperatures(counts, self.temperature_spread))
        target = self.combined(jax.lax.stop_gradient(logits), remaining) / temperatures[None]
        log_target = jax.nn.log_softmax(target)[None]
        log_own = jax.nn.log_softmax(logits / temperatures[None, None])
        apart = (jnp.exp(log_target) * (log_target - log_own)).sum(axis=-1)
        ramp = (context.epoch + 1) / self.kl_epochs
        return own + ramp * uniform - self.diversity * temperatures.mean() ** 2 * apart

    def combined(self, logits: jax.Array, remaining: jax.Array) -> jax.Array:
        """The weighted mean of the experts' logits, float `[B, C]`."""
        weights = jax.nn.softmax(remaining / self.sharpness, axis=0)
        return (weights[..., None] * logits).sum(axis=0)

    def predict(self, outputs: Outputs, params: object, context: Context) -> Prediction:
        """Each expert's logits, and the logarithm of the fused distribution's mean."""
        together = fused(opinion(jnp.exp(outputs.logits)))
        tiny = jnp.finfo(together.mean.dtype).tiny
        return Prediction(outputs.logits, jnp.log(jnp.maximum(together.mean, tiny)))


_CIFAR: dict[str, Any] = {"optim.decay_factor": 0.01, "model.shared_stages": 0}

PRESETS = {
    "tlc": Preset(
        TLC(),
        "TLC",
        experts=3,
        on={
            "digits_lt": {"model.shared_stages": 0},
            "cifar10_lt": {**_CIFAR, "optim.weight_decay": 2e-4},
            "cifar100_lt": _CIFAR,
            "imagenet_lt": {
                "total_epochs": 100,
                "batch_size": 256,
                "optim.learning_rate": 0.1,
                "optim.weight_decay": 2e-4,
                "optim.schedule": "step",
                "optim.decay_epochs": (60, 80),
                "optim.warmup_epochs": 5,
                "model.shared_stages": 3,
                "method.sharpness": 0.5,
                "method.reweight_epoch": 80,
                "method.temperature_spread": 0.02,
                "method.kl_epochs": 29000,
            },
        },
        published=(PublishedResult("cifar100_lt", "ir=100", 49.0, "BalPoE's Table 2", ece=22.8),),
    ),
}
