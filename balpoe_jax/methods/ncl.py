# SPDX-License-Identifier: Apache-2.0
"""NCL: complete networks that learn from each other, on all classes and on the hardest ones (Li et
al., CVPR 2022).

Every network learns by balanced softmax, over all classes and once more over an image's hardest
ones, and from the predictions of the others on both. Nothing is shared: three networks cost three
times one.

Followed is the authors' code (Bazinga699/NCL): losses are summed over networks, hard classes are
those of the first network's raw logits, gradients flow to both sides of a divergence, and the
logits of other classes are multiplied by 0, so that they stay in the softmax; `hard_mask="inf"`
removes them, as the paper says. Left out is the contrastive branch, which only one of the published
trainings on CIFAR uses.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.losses import log_prior
from balpoe_jax.methods.base import Batch, Facts, Losses, Method, Network
from balpoe_jax.methods.checks import check_choice, check_range
from balpoe_jax.methods.recipe import Published, Recipe
from balpoe_jax.methods.reweighted import cross_entropy
from balpoe_jax.methods.views import views

HARD_MASKS = ("zero", "inf")

_EPSILON = 1e-9  # within the logarithms of the divergence


def hard_classes(logits: jax.Array, labels: jax.Array, number: int) -> jax.Array:
    """The classes of the largest logits, the label's among them, bool `[B, C]`.

    The label's counts as one of `number`, also where its logit is not among the largest.

    Args:
        logits: float `[B, C]`.
        labels: int `[B]`.
        number: of classes for each row.
    """
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    _, indices = jax.lax.top_k(jnp.where(own, jnp.inf, logits), number)
    return jax.nn.one_hot(indices, logits.shape[-1], dtype=jnp.int32).sum(axis=1) > 0


def mutual_divergences(logits: jax.Array) -> jax.Array:
    """The sum over the others of `KL(other || own)` for each network, float `[E, B]`.

    Args:
        logits: float `[E, B, C]`; those that are minus infinity take no part.
    """
    p = jax.nn.softmax(logits)
    log_p = jnp.log(p + _EPSILON)
    # To the network on the first axis, from that on the second.
    pairs = (p[None] * (log_p[None] - log_p[:, None])).sum(axis=-1)
    return pairs.sum(axis=1)


def nested_losses(
    logits: jax.Array, labels: jax.Array, log_counts: jax.Array, number: int, hard_mask: str
) -> tuple[jax.Array, jax.Array]:
    """Each network's two cross-entropies, and its divergences from the others on both sets.

    Args:
        logits: float `[E, B, C]`, raw.
        labels: int `[B]`.
        log_counts: float `[C]`; not their shares, which a mask of zeros would tell apart.
        number: of hard classes.
        hard_mask: one of `HARD_MASKS`.

    Returns:
        Two of float `[E, B]`.
    """
    adjusted = logits + log_counts.astype(logits.dtype)[None, None]
    hard = hard_classes(jax.lax.stop_gradient(logits[0]), labels, number)[None]
    masked = jnp.where(hard, adjusted, 0.0 if hard_mask == "zero" else -jnp.inf)
    own = sum(jax.vmap(cross_entropy, (0, None))(z, labels) for z in (adjusted, masked))
    return jnp.asarray(own), mutual_divergences(adjusted) + mutual_divergences(masked)


@dataclasses.dataclass(frozen=True)
class NCL(Method):
    """See the module.

    Attributes:
        distillation: weight of the divergences, of which each network has the mean over the others.
        hard_share: of the classes that are hard for an image.
        hard_mask: "zero" or "inf".
    """

    mixes = False

    distillation: float = 0.6
    hard_share: float = 0.3
    hard_mask: str = "zero"

    def __post_init__(self) -> None:
        """Raises a `UserError` for a value that is not valid."""
        check_range("distillation", self.distillation, 0, 1e6)
        check_range("hard_share", self.hard_share, 0, 1)
        check_choice("hard_mask", self.hard_mask, HARD_MASKS)

    def target_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """Each network is balanced softmax."""
        return (1.0,) * len(taus)

    def loss(
        self, network: Network, extra: dict, batch: Batch, facts: Facts, epoch: jax.Array
    ) -> Losses:
        """The sum over networks of their means over rows."""
        outputs, batch_stats = network(batch["images"])
        log_prior(facts.class_counts)  # which refuses classes without examples
        number = max(1, int(self.hard_share * facts.num_classes))
        log_counts = jnp.asarray(np.log(facts.class_counts), jnp.float32)
        own, divergences = (
            each.mean(axis=1)
            for each in nested_losses(
                outputs.logits, batch["labels"], log_counts, number, self.hard_mask
            )
        )
        others = max(1, len(own) - 1)
        distilled = self.distillation / others * divergences.sum()
        total = own.sum() + distilled
        return Losses(total, own, batch_stats, extra, {"distillation": distilled})


_CIFAR = {
    "total_epochs": 400,
    "batch_size": 64,
    "model.classifier": "linear",
    "optim.boundaries": (320, 360),
    "optim.warmup_start": 1 / 3,
    **views("strong"),
}
_PHOTOS = {
    "optim.learning_rate": 0.2,
    "model.classifier": "cosine_bias",
    **views("rand"),
}
_PAPER = "BalPoE's Table 1"

RECIPES = {
    "ncl": Recipe(
        NCL(),
        "NCL",
        experts=3,
        fields={"model.shared_stages": -1, "optim.weight_decay": 2e-4},
        on={
            "cifar10_lt": _CIFAR,
            "cifar100_lt": _CIFAR,
            "imagenet_lt": {
                **_PHOTOS,
                "total_epochs": 200,
                "batch_size": 256,
                "model.scale": 16.0,
            },
            "inaturalist2018": {
                **_PHOTOS,
                "total_epochs": 400,
                "batch_size": 512,
                "model.scale": 32.0,
            },
        },
        epochs=400,
        published=(
            Published("cifar100_lt", "ir=50", 58.2, _PAPER),
            Published("cifar100_lt", "ir=100", 54.2, _PAPER),
            Published("imagenet_lt", "", 59.5, _PAPER),
            Published("imagenet_lt", "backbone=resnext50", 60.5, _PAPER),
            Published("inaturalist2018", "", 74.9, _PAPER),
        ),
    ),
}
