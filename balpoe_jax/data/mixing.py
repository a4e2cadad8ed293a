# SPDX-License-Identifier: Apache-2.0
"""Mixup (Zhang et al., ICLR 2018): one coefficient and one permutation a batch."""

from typing import NamedTuple

import tensorflow as tf

from balpoe_jax.data.randomness import fold_in, stream_id
from balpoe_jax.errors import UserError


class Mix(NamedTuple):
    """How the rows of one host are mixed: `weight * row + (1 - weight) * partner`.

    Attributes:
        weight: float32 scalar in [0, 1], the same for the whole batch on all hosts.
        partners: int32 `[rows]`, positions within this host's rows.
    """

    weight: tf.Tensor
    partners: tf.Tensor


def check_groups(batch_size: int, groups: int, num_hosts: int) -> None:
    """Refuses groups within which rows of one host could not find all their partners."""
    if groups < 1 or batch_size % groups or groups % num_hosts:
        raise UserError(
            f"mixup.groups must divide the batch size {batch_size} and be a multiple of the number "
            f"of hosts, {num_hosts}; got {groups}."
        )


def draw_mix(seed: tf.Tensor, alpha: float, batch_size: int, groups: int, rows: slice) -> Mix:
    """Draws the batch's coefficient and permutation as a function of `seed` alone.

    Args:
        seed: int32 `[2]`, folded with the step.
        alpha: of `Beta(alpha, alpha)`, positive.
        batch_size: of the global batch.
        groups: the batch is permuted within this many equal groups of neighbours; 1 is the
            reference, several keep the partners of a row on its host.
        rows: this host's rows: whole groups.
    """
    gamma = tf.random.stateless_gamma(
        [2], fold_in(seed, stream_id("weight")), tf.constant(alpha, tf.float64), dtype=tf.float64
    )
    size = batch_size // groups
    order = tf.random.stateless_uniform(
        [groups, size], fold_in(seed, stream_id("partners")), None, None, tf.int32, "philox"
    )
    within = tf.argsort(order, axis=1, stable=True)
    partners = tf.reshape(within + tf.range(groups)[:, None] * size, [batch_size])
    weight = tf.cast(gamma[0] / (gamma[0] + gamma[1]), tf.float32)
    return Mix(weight, partners[rows] - rows.start)


def mix_images(images: tf.Tensor, mix: Mix) -> tf.Tensor:
    """Mixes float images `[rows, H, W, 3]` with their partners."""
    return mix.weight * images + (1 - mix.weight) * tf.gather(images, mix.partners)
