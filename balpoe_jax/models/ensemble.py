# SPDX-License-Identifier: Apache-2.0
"""An ensemble of experts on a shared trunk, as one module with stacked expert parameters."""

from typing import Any, NamedTuple

import jax
from flax import linen as nn

EXPERT_MAPS = ("loop", "vmap", "stacked")


class Outputs(NamedTuple):
    """What a model returns.

    Attributes:
        logits: float `[E, B, C]`, raw: no prior was added. The ensemble's are their mean over E.
        features: float `[E, B, D]`, pooled, before the head.
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

    The parameters do not depend on `expert_map`, so a checkpoint serves all: "vmap" batches the
    experts into grouped convolutions, which suits narrow networks on TPUs; "loop" unrolls them,
    which suits wide ones and is several times faster on a CPU. "stacked" is "vmap" but for the
    convolutions, which `expert.body` must unroll (see `models.convolutions`): on a GPU everything
    else is one kernel for all experts.

    Attributes:
        trunk: What all experts share.
        expert: One expert.
        num_experts: `E`.
        expert_map: See above.
        shallow: Module that makes factors `[E, B, h, w, D]` of the experts' maps from the outputs
            of the trunk's stages, whose `all_stages` is True then; None for no factors.
    """

    trunk: nn.Module
    expert: nn.Module
    num_experts: int
    expert_map: str = "loop"
    shallow: nn.Module | None = None

    def __call__(self, images: jax.Array, train: bool) -> Outputs:
        """Logits and features of every expert.

        Args:
            images: float `[B, H, W, 3]`, normalised.
            train: use and update batch statistics (apply with `mutable=["batch_stats"]`).
        """
        shared = self.trunk(images, train)
        factors: tuple[jax.Array, ...] = ()
        if self.shallow is not None:
            factors = (self.shallow(shared, train),)
            shared = shared[-1]
        axes: Any = {"params": 0, "batch_stats": 0}
        # The two maps split keys differently: initialising with one makes a seed mean one network.
        # For one expert vmap is free, while the scan would keep a loop that is slow on a CPU.
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
