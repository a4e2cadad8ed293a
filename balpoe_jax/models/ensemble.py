# SPDX-License-Identifier: Apache-2.0
"""An ensemble of experts on a shared trunk, as one module with stacked expert parameters."""

from typing import Any, NamedTuple

import jax
from flax import linen as nn

EXPERT_MAPS = ("loop", "vmap", "stacked")


class Outputs(NamedTuple):
    """The outputs of a model.

    Attributes:
        logits: Raw logits, to which no prior was added, float `[E, B, C]`. Their mean over E are
            the ensemble's logits.
        features: Pooled features before the head, float `[E, B, D]`.
    """

    logits: jax.Array
    features: jax.Array


class Expert(nn.Module):
    """One expert: a body that pools features, and a head."""

    body: nn.Module
    head: nn.Module

    def __call__(self, shared: jax.Array, train: bool, factor: jax.Array | None = None) -> Outputs:
        """The trunk's output -> logits `[B, C]` and features `[B, D]`.

        Args:
            shared: Output of the trunk.
            train: Whether to use and update batch statistics.
            factor: Array `[B, h, w, D]` that multiplies the body's map before it is pooled; None
                for none.
        """
        factors = () if factor is None else (factor,)
        features = self.body(shared, train, *factors)
        return Outputs(self.head(features), features)


class ExpertEnsemble(nn.Module):
    """Maps one expert over `num_experts` sets of parameters, stacked on a leading axis `[E, ...]`.

    The parameters do not depend on `expert_map`, so a checkpoint fits all three. "vmap" batches the
    experts into grouped convolutions, which suits narrow networks on TPUs. "loop" unrolls them,
    which suits wide ones and is several times faster on a CPU. "stacked" is "vmap", except that
    `expert.body` unrolls the convolutions (see `models.convolutions`): on a GPU everything else is
    one kernel for all experts.

    Attributes:
        trunk: Module that all experts share.
        expert: Module of one expert.
        num_experts: Number of experts, `E`.
        expert_map: Way of applying the experts, as above.
        shallow: Module that makes factors `[E, B, h, w, D]` of the experts' maps from the outputs
            of the trunk's stages, whose `all_stages` is then True; None for no factors.
    """

    trunk: nn.Module
    expert: nn.Module
    num_experts: int
    expert_map: str = "loop"
    shallow: nn.Module | None = None

    def __call__(self, images: jax.Array, train: bool) -> Outputs:
        """Logits and features of every expert.

        Args:
            images: Normalised images, float `[B, H, W, 3]`.
            train: Whether to use and update batch statistics (with `mutable=["batch_stats"]`).
        """
        shared = self.trunk(images, train)
        factors: tuple[jax.Array, ...] = ()
        if self.shallow is not None:
            factors = (self.shallow(shared, train),)
            shared = shared[-1]
        axes: Any = {"params": 0, "batch_stats": 0}
        # The two maps split keys differently, so only one of them initialises, and a seed means one
        # network. For one expert vmap is free, while the scan would keep a slow loop on a CPU.
        if self.expert_map != "loop" or self.num_experts == 1 or self.is_initializing():
            mapped = nn.vmap(
                lambda expert, *factor: expert(shared, train, *factor),
                variable_axes=axes,
                split_rngs={"params": True},
                in_axes=(0,) * len(factors),
                axis_size=self.num_experts,
            )
            return mapped(self.expert, *factors)
        scanned = nn.scan(
            lambda expert, carry, *factor: (carry, expert(shared, train, *factor)),
            variable_axes=axes,
            split_rngs={"params": True},
            length=self.num_experts,
            unroll=self.num_experts,
        )
        return scanned(self.expert, (), *factors)[1]
