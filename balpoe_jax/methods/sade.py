# SPDX-License-Identifier: Apache-2.0
"""SADE: three experts with different logit adjustments, to be weighed anew on each test set.

Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed
Recognition", NeurIPS 2022. The first expert keeps the training prior, the second is balanced, the
third is biased to the prior with its ranks reversed: the most frequent class gets the rarest one's.
That is a permutation of the prior and not its inverse, which BalPoE's last expert has. The total is
the sum over experts, where BalPoE takes the mean.

Where we differ: classes of equal counts are ranked by a stable sort, where the released code leaves
their order to the sorting algorithm. How the experts are weighed is in `balpoe_jax.aggregation`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError
from balpoe_jax.losses import log_prior
from balpoe_jax.methods.base import Batch, Facts, Losses, Method, Network, mixed_targets
from balpoe_jax.methods.checks import check_range
from balpoe_jax.methods.recipe import Published, Recipe
from balpoe_jax.models import ExpertEnsemble


def reversed_prior(prior: npt.ArrayLike) -> npt.NDArray[Any]:
    """The prior of the class that is as rare as the class is frequent, and the other way round.

    Args:
        prior: `[C]`, or any increasing function of it.

    Returns:
        `[C]`, a permutation. Ties are ranked by the order of the classes.
    """
    values = np.asarray(prior)
    order = np.argsort(values, kind="stable")
    reverse = np.empty_like(values)
    reverse[order] = values[order[::-1]]
    return reverse


def log_biases(class_counts: npt.NDArray[np.integer], strength: float) -> jax.Array:
    """What is added to the logits of the three experts in training.

    Args:
        class_counts: int `[C]`, none of them 0.
        strength: of the third expert's reversed prior (the paper's lambda).

    Returns:
        float32 `[3, C]`.
    """
    prior = log_prior(class_counts)
    reverse = log_prior(reversed_prior(class_counts))
    return jnp.stack([jnp.zeros_like(prior), prior, prior - strength * reverse])


def expert_losses(logits: jax.Array, targets: jax.Array, biases: jax.Array) -> jax.Array:
    """Cross-entropies of logits to which each expert's bias was added.

    Args:
        logits: float `[3, B, C]`.
        targets: float `[B, C]`, label distributions.
        biases: float `[3, C]`, see `log_biases`.

    Returns:
        float `[3, B]`, in nats.
    """
    adjusted = logits + biases[:, None].astype(logits.dtype)
    return -(targets[None].astype(logits.dtype) * jax.nn.log_softmax(adjusted)).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class SADE(Method):
    """The sum over its three experts; predicts their mean where no weights are learned.

    Attributes:
        strength: of the third expert's reversed prior (the paper's lambda).
    """

    strength: float = 2.0

    def __post_init__(self) -> None:
        """Raises a `UserError` for a value that is not valid."""
        check_range("strength", self.strength, -100, 100)

    def target_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """Of the first two; the third one's bias is no multiple of the log prior."""
        return (0.0, 1.0, None)

    def network(self, ensemble: ExpertEnsemble, facts: Facts) -> ExpertEnsemble:
        """The three experts.

        Raises:
            UserError (a `ValueError`): another number of experts.
        """
        if ensemble.num_experts != 3:
            raise UserError(
                f"The method sade has 3 experts, got {ensemble.num_experts}; leave "
                "config.model.num_experts at 3."
            )
        return ensemble

    def loss(
        self, network: Network, extra: dict, batch: Batch, facts: Facts, epoch: jax.Array
    ) -> Losses:
        """The sum over experts, of means over rows."""
        outputs, batch_stats = network(batch["images"])
        targets = mixed_targets(batch, facts.num_classes)
        biases = log_biases(facts.class_counts, self.strength)
        by_expert = expert_losses(outputs.logits, targets, biases).mean(axis=1)
        return Losses(by_expert.sum(), by_expert, batch_stats, extra)


_LINEARLY = {
    "optim.schedule": "step",
    "optim.boundaries": (60, 80),
    "optim.warmup_epochs": 5,
    "method.strength": 1.0,
}

RECIPES = {
    "sade": Recipe(
        SADE(),
        "SADE",
        experts=3,
        # All else is as BalPoE's standard recipes have it, which descend from these.
        fields={"model.reduce_dimension": True},
        on={
            # The authors' advice for CIFAR-10.
            "cifar10_lt": {"model.reduce_dimension": False, "optim.learning_rate": 0.05},
            "inaturalist2018": _LINEARLY,
        },
        published=(
            Published("cifar100_lt", "ir=10", 63.6, "SADE's paper"),
            Published("cifar100_lt", "ir=50", 53.9, "SADE's paper"),
            Published("cifar100_lt", "ir=100", 49.8, "SADE's repository"),
            Published("imagenet_lt", "backbone=resnet50", 57.8, "quoted by later papers"),
            Published("imagenet_lt", "backbone=resnext50", 58.8, "SADE's repository"),
            Published("inaturalist2018", "", 72.9, "SADE's repository"),
            Published("cifar100_lt", "ir=10,recipe=long", 65.3, "BalPoE's Table 1"),
            Published("cifar100_lt", "ir=50,recipe=long", 57.3, "BalPoE's Table 1"),
            Published("cifar100_lt", "ir=100,recipe=long", 52.2, "BalPoE's Table 1"),
            Published("imagenet_lt", "backbone=resnext50,recipe=long", 61.2, "BalPoE's Table 1"),
            Published("inaturalist2018", "recipe=long", 74.5, "BalPoE's Table 1"),
        ),
    ),
}
