# SPDX-License-Identifier: Apache-2.0
"""Samplers in NumPy: the examples of each batch, as functions of (seed, step) alone.

They follow the rules of `balpoe_jax.data.batches.samplers`, with other draws.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.device.randomness import generator
from balpoe_jax.data.settings import TrainSettings, steps_per_epoch

Labels = npt.NDArray[np.integer]
Positions = npt.NDArray[np.int32]


class Order:
    """The examples of every global batch of a training set.

    Args:
        labels: Classes of the examples, int `[N]`.
        settings: Sampler, batch size and seed.
    """

    def __init__(self, labels: Labels, settings: TrainSettings) -> None:
        self._settings = settings
        self._per_epoch = steps_per_epoch(len(labels), settings.batch_size)
        self._epoch, self._order = -1, np.empty(0, np.int32)
        self._sampler = None
        if settings.sampler == "class_balanced":
            self._sampler = WeightedSampler(labels)
        elif settings.sampler == "class_aware":
            length = self._per_epoch * settings.batch_size
            self._draw_epoch: Callable[[np.random.Generator], Positions] = ClassAwareOrder(
                labels, length, settings.samples_per_class
            )
        else:
            self._draw_epoch = lambda random: random.permutation(len(labels)).astype(np.int32)

    def positions(self, step: int) -> Positions:
        """Positions in the training set of the batch of a step, int32 `[B]`; steps count from 0."""
        size, seed = self._settings.batch_size, self._settings.seed
        if self._sampler is not None:
            return self._sampler.draw(generator(seed, "order", step), size)
        epoch, within = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._order = self._draw_epoch(generator(seed, "order", epoch))
            self._epoch = epoch
        # The last batch of an epoch wraps to the start of the epoch's order.
        return self._order[(within * size + np.arange(size)) % len(self._order)]


class WeightedSampler:
    """Draws examples with replacement: a class by its weight, then evenly among its examples.

    Args:
        labels: Classes of the examples, int `[N]`.
        exponent: Power of a class's size to which its odds are proportional: 1 draws every example
            with even odds, 0 every class; classes without examples never.
    """

    def __init__(self, labels: Labels, exponent: float = 0.0) -> None:
        members = members_of_classes(labels)
        self._members = np.concatenate(members).astype(np.int32)
        self._sizes = np.array([len(of_class) for of_class in members])
        # Relative to the largest, so that no exponent overflows.
        weights = (self._sizes / self._sizes.max()) ** exponent
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._bounds = (np.cumsum(weights) / weights.sum())[:-1]

    def draw(self, random: np.random.Generator, rows: int) -> Positions:
        """Positions int32 `[rows]`."""
        chosen = np.searchsorted(self._bounds, random.random(rows), side="right")
        within = (random.random(rows) * self._sizes[chosen]).astype(np.int64)
        return self._members[self._starts[chosen] + within]


class ClassAwareOrder:
    """The order of an epoch in which the classes take turns, see `samplers.ClassAwareOrder`.

    Args:
        labels: Classes of the examples, int `[N]`.
        length: Number of positions in an epoch.
        run: Number of examples in a turn.
    """

    def __init__(self, labels: Labels, length: int, run: int) -> None:
        self._members = members_of_classes(labels)
        self._length, self._run = length, run
        self._rounds = -(-length // (run * len(self._members)))

    def __call__(self, random: np.random.Generator) -> Positions:
        """Positions int32 `[length]`."""
        classes = len(self._members)
        turns = np.stack([random.permutation(classes) for _ in range(self._rounds)])
        used = self._rounds * self._run
        # A class's list is shuffled again each time that it is used up.
        lists = np.stack([self._shuffled(random, of_class, used) for of_class in self._members])
        runs = lists.reshape(classes, self._rounds, self._run)
        order = runs[turns, np.arange(self._rounds)[:, None]]
        return order.reshape(-1)[: self._length].astype(np.int32)

    @staticmethod
    def _shuffled(
        random: np.random.Generator, members: npt.NDArray[np.integer], length: int
    ) -> npt.NDArray[np.integer]:
        copies = np.broadcast_to(members, (-(-length // len(members)), len(members)))
        return random.permuted(copies, axis=1).reshape(-1)[:length]


def members_of_classes(labels: Labels) -> list[npt.NDArray[np.integer]]:
    """The positions of each class, by class; classes without examples are left out."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels))[:-1]
    return [of_class for of_class in np.split(order, ends) if len(of_class)]
