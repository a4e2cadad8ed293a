# SPDX-License-Identifier: Apache-2.0
"""Which examples a batch is made of: functions of (seed, step) alone, like all of the pipeline."""

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
        labels: int `[N]` of the training set.
        batch_size: of the global batch.
        seed: of the run.
        first_step, last_step: the steps, without the last.
        sampler: one of `SAMPLERS`; an epoch has `steps_per_epoch` steps with each.
        samples_per_class: Number of examples of a class that follow each other in "class_aware".
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
        labels: int `[N]`.
        exponent: a class of `n` examples is drawn with probability proportional to `n ** exponent`:
            1 draws every example with even odds, 0 every class; classes without examples never.
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

    Classes come in a random order, drawn anew for each time round; a class's turn is a run of so
    many of its examples, in a random order that is likewise drawn anew when it is used up. Other
    than in MiSLAS's code, the lists begin anew with every epoch, which makes an epoch's order a
    function of its number.

    Args:
        labels: int `[N]`.
        length: positions in an epoch.
        run: examples in a turn.
    """

    def __init__(self, labels: Labels, length: int, run: int) -> None:
        members = _members(labels)
        self._length, self._run, self._num_classes = length, run, len(members)
        self._rounds = -(-length // (run * len(members)))
        # Of each class as many copies of its list as an epoch may need.
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
    """Positions that shuffle within the groups of float64 `[n]`, which count up in steps of one."""
    keys = tf.random.stateless_uniform(tf.shape(groups), seed, dtype=tf.float64, alg="philox")
    return tf.argsort(groups + keys)


def _members(labels: Labels) -> list[npt.NDArray[np.integer]]:
    """The positions of each class that has any, by class."""
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    return [of_class for of_class in np.split(order, np.cumsum(sizes)[:-1]) if len(of_class)]
