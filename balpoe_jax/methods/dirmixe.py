# SPDX-License-Identifier: Apache-2.0
"""DirMixE: experts for random test distributions (Yang et al., ICML 2024).

Each of three experts serves a Dirichlet distribution over label distributions. Their means are the
training distribution, a uniform one and the training distribution with its ranks reversed. A step
draws 60 label distributions: first an expert, each with the same probability, then a distribution
of that expert's Dirichlet. The expert is trained on each by logit adjustment. The loss is the mean
over the draws; late in training the semi-variance over the draws is added: the squares of what lies
above the mean. At test time experts are weighted as SADE's are (`sade.py`).

Followed is the authors' code (scongl/DirMixE). The adjustment is `log((w / prior)^power + 1e-9)`
with a power above 1. The semi-variance divides by the number of draws above the mean, less one. It
counts in the last fifth of the epochs.

Where we differ: every step has draws of its own, a function of seed and step. The code draws one
epoch's distributions before training and shuffles them in each epoch. Its loss refuses the kind of
data that its configuration for iNaturalist names; we take the other values from there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.losses import log_prior, logit_adjusted_cross_entropy
from balpoe_jax.methods.base import Context, Losses, Method, Network, epochs, soft_labels
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.methods.sade import CIFAR_TEST_VIEW, PHOTO_TEST_VIEW, reversed_counts
from balpoe_jax.setting import setting

_EXPERTS = 3
_RATIO_EPSILON = 1e-9  # the code's, which keeps the logarithm of a tiny ratio finite


def expert_targets(class_counts: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """The means of the experts' Dirichlet distributions, float64 `[3, C]`, each of sum 1.

    Args:
        class_counts: int `[C]`, none of them 0.
    """
    rows = (class_counts, np.ones_like(class_counts), reversed_counts(class_counts))
    return np.stack([row / row.sum() for row in rows])


def draw_targets(
    key: jax.Array, means: npt.ArrayLike, samples: int, concentration: float
) -> tuple[jax.Array, jax.Array]:
    """Draws experts, and for each a label distribution of its Dirichlet.

    Args:
        key: Key of the random numbers.
        means: float `[E, C]`, see `expert_targets`.
        samples: Number of draws, `M`.
        concentration: Sum of the parameters of each Dirichlet.

    Returns:
        The experts int32 `[M]`, and the logarithms of the distributions float32 `[M, C]`.
    """
    means = jnp.asarray(means, jnp.float32)
    for_expert, for_target = jax.random.split(key)
    experts = jax.random.randint(for_expert, (samples,), 0, len(means))
    # Logarithms, for a gamma variate of a small parameter may be too small for a float.
    gamma = jax.random.loggamma(for_target, concentration * means[experts], dtype=jnp.float32)
    return experts, jax.nn.log_softmax(gamma)


def adjustments(
    log_targets: jax.Array, class_counts: npt.NDArray[np.integer], power: float
) -> jax.Array:
    """What is added to the logits in training, float `[M, C]`.

    Args:
        log_targets: float `[M, C]`, logarithms of label distributions.
        class_counts: int `[C]`, none of them 0.
        power: Exponent of the ratio of label distribution and training prior.

    Raises:
        UserError (a `ValueError`): an empty class, or counts that are not valid.
    """
    log_prior(class_counts)  # says what is wrong with counts
    counts = np.asarray(class_counts, np.float64)
    log_ratio = log_targets - jnp.asarray(np.log(counts / counts.sum()), log_targets.dtype)[None]
    return -jnp.log(jnp.exp(power * log_ratio) + _RATIO_EPSILON)


def draw_losses(
    expert_logits: jax.Array, labels: jax.Array, experts: jax.Array, biases: jax.Array
) -> jax.Array:
    """The cross-entropy of each draw and row, float `[M, B]`.

    Args:
        expert_logits: float `[E, B, C]`.
        labels: int `[B]`, or float `[B, C]` distributions.
        experts: int `[M]`, the expert of each draw.
        biases: float `[M, C]`, see `adjustments`.
    """

    def of_draw(expert: jax.Array, bias: jax.Array) -> jax.Array:
        return logit_adjusted_cross_entropy(expert_logits[expert], labels, bias, 1.0)

    return jax.vmap(of_draw)(experts, biases)


def semi_variance(losses: jax.Array) -> jax.Array:
    """The variance above the mean of losses `[M]`, a scalar; 0 for equal ones."""
    excess = losses - losses.mean()
    above = excess > 0
    squares = jnp.where(above, excess, 0.0) ** 2
    return squares.sum() / jnp.maximum(above.sum() - 1, 1)


@dataclasses.dataclass(frozen=True)
class DirMixE(Method):
    """See the module."""

    needs_global_batch = True

    concentration: float = setting(
        1e4, "Sum of the parameters of each expert's Dirichlet distribution.", 1e-3, 1e9
    )
    samples: int = setting(60, "Number of label distributions that a step draws.", 2, 1e4)
    power: float = setting(
        1.3, "Exponent of the ratio of label distribution and training prior.", 0, 100
    )
    variance_weight: float = setting(
        5.0, "Factor of the semi-variance, the paper's lambda.", 0, 1e6
    )
    variance_epoch: int = epochs(160, "Number of epochs before the semi-variance counts.")

    def init_state(self, network: Network, context: Context, key: jax.Array) -> Any:
        """The key of all draws, which depends on the seed alone and never changes."""
        return {"key": jax.random.key_data(key)}

    def loss(
        self, network: Network, method_state: Any, batch: TrainBatch, context: Context
    ) -> Losses:
        """The mean over the draws of losses of the whole batch, later with their semi-variance.

        Raises:
            UserError (a `ValueError`): another number of experts than 3.
        """
        outputs, batch_stats = network(batch.images)
        if len(outputs.logits) != _EXPERTS:
            raise UserError(
                f"DirMixE has {_EXPERTS} experts, got {len(outputs.logits)}; leave experts alone."
            )
        key = jax.random.fold_in(jax.random.wrap_key_data(method_state["key"]), context.step)
        means = expert_targets(context.class_counts)
        experts, log_targets = draw_targets(key, means, self.samples, self.concentration)
        biases = adjustments(log_targets, context.class_counts, self.power)
        targets = soft_labels(batch, context.num_classes)
        rows = draw_losses(outputs.logits, targets, experts, biases)
        # Of the whole batch, for the semi-variance is no mean over rows.
        losses = context.gather(rows.T).mean(axis=0)
        variance = semi_variance(losses)
        weight = jnp.where(context.epoch >= self.variance_epoch, self.variance_weight, 0.0)
        own = jax.nn.one_hot(experts, _EXPERTS, axis=0, dtype=losses.dtype)
        by_expert = (own * losses[None]).sum(axis=1) / jnp.maximum(own.sum(axis=1), 1)
        total = losses.mean() + weight * variance
        return Losses(total, by_expert, batch_stats, method_state, {"semi_variance": variance})


_PAPER = "the paper, by Papers with Code"

PRESETS = {
    "dirmixe": Preset(
        DirMixE(),
        "DirMixE",
        experts=_EXPERTS,
        fields={"model.reduce_dimension": True, "eval.expert_weights_epochs": 5},
        on={
            "digits_lt": {"test_view.flip": False, "test_view.crop_padding": 1},
            "cifar10_lt": {**CIFAR_TEST_VIEW, "method.variance_weight": 15.0},
            "cifar100_lt": {**CIFAR_TEST_VIEW, "optim.weight_decay": 1e-3},
            "imagenet_lt": {
                **PHOTO_TEST_VIEW,
                "method.power": 1.6,
                "method.variance_weight": 1.0,
                "optim.weight_decay": 7e-4,
                "eval.expert_weights_rate": 0.025,
            },
            "inaturalist2018": {
                **PHOTO_TEST_VIEW,
                "test_view.crop_area": 0.08,
                "method.concentration": 1e5,
                "method.variance_weight": 1.0,
                "optim.schedule": "step",
                "optim.decay_epochs": (60, 80),
                "optim.warmup_epochs": 5,
                "eval.expert_weights_rate": 0.2,
            },
        },
        published=(
            PublishedResult("cifar10_lt", "ir=100", 83.26, _PAPER),
            PublishedResult("cifar100_lt", "ir=100", 48.38, _PAPER),
        ),
    ),
}
