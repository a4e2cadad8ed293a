# SPDX-License-Identifier: Apache-2.0
"""Subjective opinions from Dirichlet evidence, and how they are fused (Jøsang, 2016).

Evidence `e >= 0` of C classes is a Dirichlet distribution of concentration `e + 1`. The same in
other terms, with `S = sum(e + 1)`, are a belief `b = e / S` in each class and an uncertainty
`u = C / S`, which sum to 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln

# Smallest agreement to divide by; that of opinions that contradict each other entirely is 0.
_LEAST_AGREEMENT = 1e-30


class Opinion(NamedTuple):
    """Belief float `[..., C]` and uncertainty float `[...]`, of sum 1."""

    belief: jax.Array
    uncertainty: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The expected probabilities of the Dirichlet distribution, float `[..., C]`."""
        return self.belief + self.uncertainty[..., None] / self.belief.shape[-1]


def opinion(evidence: jax.Array) -> Opinion:
    """The opinion of evidence float `[..., C]`."""
    total = (evidence + 1).sum(axis=-1)
    return Opinion(evidence / total[..., None], evidence.shape[-1] / total)


def agreement(first: Opinion, second: Opinion) -> jax.Array:
    """One minus the conflict of two opinions, which is the mass on two different classes.

    It is summed from the parts that do not conflict, since the difference would cancel.
    """
    common = (first.belief * second.belief).sum(axis=-1) + first.uncertainty * second.uncertainty
    common += first.uncertainty * second.belief.sum(axis=-1)
    common += second.uncertainty * first.belief.sum(axis=-1)
    return jnp.maximum(common, _LEAST_AGREEMENT)


def fuse(first: Opinion, second: Opinion) -> Opinion:
    """Dempster's rule: commutative, and the vacuous opinion (`u = 1`) changes nothing."""
    common = agreement(first, second)
    belief = (
        first.belief * second.belief
        + first.belief * second.uncertainty[..., None]
        + second.belief * first.uncertainty[..., None]
    )
    return Opinion(belief / common[..., None], first.uncertainty * second.uncertainty / common)


def divergence_from_uniform(concentration: jax.Array) -> jax.Array:
    """`KL(Dir(concentration) || Dir(1))` in nats, float `[...]`; 0 for ones.

    Args:
        concentration: Concentrations of at least 1, float `[..., C]`.
    """
    total = concentration.sum(axis=-1, keepdims=True)
    logs = gammaln(total)[..., 0] - gammaln(concentration).sum(axis=-1)
    constant = gammaln(jnp.asarray(concentration.shape[-1], concentration.dtype))
    expected = (concentration - 1) * (digamma(concentration) - digamma(total))
    return logs - constant + expected.sum(axis=-1)
