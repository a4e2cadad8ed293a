# SPDX-License-Identifier: Apache-2.0
"""Samplers: the examples of each batch, as functions of (seed, step) alone."""

from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from balpoe_jax.data.randomness import RowRandom, fold_in, stream_id, stream_seed
from balpoe_jax.data.settings import steps_per_epoch
from balpoe_jax.data.tracing import no_autograph

Labels = npt.NDArray[np.integer]


def batches(
    labels: Labels,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    sampler: str = "shuffle",
    samples_per_class: int = 1,
) -> tf.data.Dataset:
    """Pairs of a step, int64, and the positions int32 `[B]` of its global batch.

    Args:
        labels: Classes of the training set, int `[N]`.
        batch_size: Size of the global batch.
        seed: Seed of the run.
        first_step, last_step: Range of the steps; the last one is excluded.
        sampler: One of `SAMPLERS`; an epoch has `steps_per_epoch` steps with each.
        samples_per_class: Number of consecutive examples of a class in "class_aware".
    """
    if sampler == "class_balanced":
        balanced = WeightedSampler(labels)

        def draw(step: tf.Tensor) -> tf.Tensor:
            random = RowRandom(stream_seed(seed, "order", step), batch_size, slice(0, batch_size))
            return step, balanced.draw(random)

        return tf.data.Dataset.range(first_step, last_step).map(no_autograph(draw))

    per_epoch = steps_per_epoch(len(labels), batch_size)
    make_order: Any = _shuffled
    if sampler == "class_aware":
        make_order = ClassAwareOrder(labels, per_epoch * batch_size, samples_per_class)

    def steps_of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        order = make_order(stream_seed(seed, "order", epoch), len(labels))
        size = tf.size(order)

        def indices(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            start = tf.cast(step - epoch * per_epoch, tf.int32) * batch_size
            return step, tf.gather(order, (start + tf.range(batch_size)) % size)

        start = tf.maximum(epoch * per_epoch, first_step)
        stop = tf.minimum((epoch + 1) * per_epoch, last_step)
        return tf.data.Dataset.range(start, stop).map(indices)

    epochs = tf.data.Dataset.range(first_step // per_epoch, -(-last_step // per_epoch))
    return epochs.flat_map(no_autograph(steps_of_epoch))


def _shuffled(seed: tf.Tensor, num_examples: int) -> tf.Tensor:
    return tf.random.experimental.stateless_shuffle(tf.range(num_examples), seed, "philox")


class WeightedSampler:
    """Draws examples with replacement: a class by its weight, then evenly among its examples.

    Args:
        labels: Classes of the training set, int `[N]`.
        exponent: Power of a class's size to which its probability is proportional: 1 draws every
            example with even odds, 0 every class. Classes without examples are never drawn.
    """

    def __init__(self, labels: Labels, exponent: float = 0.0) -> None:
        members = _members(labels)
        sizes = np.array([len(of_class) for of_class in members])
        # Relative to the largest, so that no exponent overflows.
        weights = (sizes / sizes.max()) ** exponent
        self._members = tf.constant(np.concatenate(members), tf.int32)
        self._sizes = tf.constant(sizes, tf.float64)
        self._starts = tf.constant(np.cumsum(sizes) - sizes, tf.int32)
        self._bounds = tf.constant((np.cumsum(weights) / weights.sum())[:-1], tf.float64)

    def draw(self, random: RowRandom) -> tf.Tensor:
        """Positions int32 `[rows]`, by draws of `random`."""
        chosen = tf.searchsorted(
            self._bounds, random.uniform("class", dtype=tf.float64), side="right"
        )
        share = random.uniform("example", dtype=tf.float64)
        within = tf.cast(share * tf.gather(self._sizes, chosen), tf.int32)
        return tf.gather(self._members, tf.gather(self._starts, chosen) + within)


class ClassAwareOrder:
    """The order of an epoch in which the classes take turns.

    In each round every class has one turn, in an order that is drawn for the round. A turn takes
    the next `run` examples from a shuffled list of the class, which is shuffled again when it is
    used up. Unlike in MiSLAS's code, the lists start again with every epoch, so that an epoch's
    order is a function of its number.

    Args:
        labels: Classes of the training set, int `[N]`.
        length: Number of positions in an epoch.
        run: Number of examples in a turn.
    """

    def __init__(self, labels: Labels, length: int, run: int) -> None:
        members = _members(labels)
        self._length, self._run, self._num_classes = length, run, len(members)
        self._rounds = -(-length // (run * len(members)))
        # As many copies of each class's list as an epoch may need.
        used = self._rounds * run
        lists = [
            np.broadcast_to(of_class, (-(-used // len(of_class)), len(of_class)))
            for of_class in members
        ]
        sizes = np.array([copies.size for copies in lists])
        numbers = np.repeat(
            np.arange(sum(len(copies) for copies in lists)),
            [copies.shape[1] for copies in lists for _ in copies],
        )
        self._slots = tf.constant(np.concatenate([copies.ravel() for copies in lists]), tf.int32)
        self._lists = tf.constant(numbers, tf.float64)
        self._starts = tf.constant(np.cumsum(sizes) - sizes, tf.int32)

    def __call__(self, seed: tf.Tensor, num_examples: int) -> tf.Tensor:
        """Positions int32 `[length]`, by draws from `seed`."""
        turns = tf.range(self._rounds * self._num_classes) // self._num_classes
        order = _shuffled_within(tf.cast(turns, tf.float64), fold_in(seed, stream_id("classes")))
        classes = order % self._num_classes
        slots = tf.gather(
            self._slots, _shuffled_within(self._lists, fold_in(seed, stream_id("examples")))
        )
        position = tf.range(self._length)
        turn = position // self._run
        before = turn // self._num_classes * self._run + position % self._run
        return tf.gather(slots, tf.gather(self._starts, tf.gather(classes, turn)) + before)


def _shuffled_within(groups: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Positions that shuffle within groups; float64 `[n]` numbers them, ascending in steps of 1."""
    keys = tf.random.stateless_uniform(tf.shape(groups), seed, dtype=tf.float64, alg="philox")
    return tf.argsort(groups + keys)


def _members(labels: Labels) -> list[npt.NDArray[np.integer]]:
    """The positions of each class, by class; classes without examples are left out."""
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    return [of_class for of_class in np.split(order, np.cumsum(sizes)[:-1]) if len(of_class)]
