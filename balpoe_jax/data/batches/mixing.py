# SPDX-License-Identifier: Apache-2.0
"""Mixing rules: how each image is mixed with a partner, and the share of the label each gets.

A rule says how pixels are combined, how much of the loss each label gets, and where partners come
from. The rules are mixup (Zhang et al., ICLR 2018), CutMix (Yun et al., ICCV 2019), Remix (Chou et
al., ECCV workshops 2020), UniMix (Xu et al., NeurIPS 2021) and CMO (Park et al., CVPR 2022). All
draws are functions of (seed, step).
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from balpoe_jax.data.batches.samplers import Labels, WeightedSampler
from balpoe_jax.data.randomness import RowRandom, fold_in, stream_id, stream_seed
from balpoe_jax.data.settings import BOX_RULES, REMIX_RULES, MixSettings, steps_per_epoch


class Mix(NamedTuple):
    """How the images of one host are mixed: `share * images + (1 - share) * others`.

    Attributes:
        share: Share of the image in each pixel, float32 that broadcasts to `[rows, H, W, 3]`.
        partners: Positions of the partners among this host's images, int32 `[rows]`; None if the
            partners are read by themselves.
        second_share: The same as `share` for the second view; None where that is not mixed.
    """

    share: tf.Tensor
    partners: tf.Tensor | None
    second_share: tf.Tensor | None = None

    def of_view(self, number: int) -> "Mix | None":
        """How a view is mixed, counted from 0; None for not at all."""
        if number == 1 and self.second_share is not None:
            return Mix(self.second_share, self.partners)
        return None if number else self


class MixedLabels(NamedTuple):
    """The second labels of a mixed batch, and how much the first ones count.

    Attributes:
        other_labels: Classes of the partners, int32 `[rows]`.
        weight: Share of the batch's own labels in the loss, float32 `[rows]`.
    """

    other_labels: tf.Tensor
    weight: tf.Tensor


class Mixer:
    """Draws how the batches of a training set are mixed, for the rows of one host.

    Args:
        settings: Settings with a positive alpha.
        labels: Classes of the training set, int `[N]`.
        image_shape: Shape of an image, `(H, W, 3)`.
        batch_size: Size of the global batch.
        seed: Seed of the run.
        rows: Rows of this host; whole groups, unless partners come from the sampler.
    """

    def __init__(
        self,
        settings: MixSettings,
        labels: Labels,
        image_shape: tuple[int, int, int],
        batch_size: int,
        seed: int,
        rows: slice,
    ) -> None:
        self._settings = settings
        self._height, self._width, _ = image_shape
        self._batch_size, self._seed, self._rows = batch_size, seed, rows
        self._per_epoch = steps_per_epoch(len(labels), batch_size)
        self._counts = tf.constant(np.bincount(labels), tf.float64)
        self._sampler = (
            WeightedSampler(labels, settings.sampling_power) if settings.from_sampler else None
        )

    def mixes(self, step: tf.Tensor) -> tf.Tensor:
        """Whether the batch of a step is mixed, a bool scalar."""
        settings = self._settings
        epoch = step // self._per_epoch
        drawn = tf.random.stateless_uniform([], self._stream(step, "gate"), alg="philox")
        mixed = (epoch >= settings.first_epoch) & (drawn < settings.probability)
        return mixed & (epoch < settings.last_epoch) if settings.last_epoch else mixed

    def partners_to_read(self, step: tf.Tensor) -> tf.Tensor:
        """Positions int32 `[rows]` in the training set of the second sampler's images."""
        assert self._sampler is not None
        seed = self._stream(step, "sampler")
        return self._sampler.draw(RowRandom(seed, self._batch_size, self._rows))

    def draw(
        self, step: tf.Tensor, labels: tf.Tensor, read_labels: tf.Tensor | None = None
    ) -> tuple[Mix, MixedLabels]:
        """Draws the mixture of a batch.

        Args:
            step: Number of the step, int64 scalar.
            labels: Classes of the rows, int32 `[rows]`.
            read_labels: Classes of the partners that were read; None without the sampler.
        """
        rule, second_share = self._settings.rule, None
        partners = None if self._sampler else self._partners(step, labels)
        others = tf.gather(labels, partners) if partners is not None else read_labels
        counts, other_counts = tf.gather(self._counts, labels), tf.gather(self._counts, others)
        if rule == "unimix":
            of_rows = self._coefficients(step, (self._batch_size,))[self._rows]
            weight = _favour_rare(of_rows, counts, other_counts)
            share = weight[:, None, None, None]
        else:
            coefficient = self._coefficients(step)
            share, weight = self._shares(step, coefficient)
            if self._settings.of_two_views:
                second_share = _outside(self._box(step, coefficient))
            if rule in REMIX_RULES:
                weight = relabel(
                    weight,
                    counts,
                    other_counts,
                    self._settings.remix_kappa,
                    self._settings.remix_tau,
                )
        weight = tf.ones_like(labels, tf.float32) * weight
        if not self._settings.always:
            mixed = self.mixes(step)
            others = tf.where(mixed, others, labels)
            share, weight, second_share = (
                x if x is None else tf.where(mixed, x, tf.ones_like(x))
                for x in (share, weight, second_share)
            )
        return Mix(share, partners, second_share), MixedLabels(others, weight)

    def _shares(self, step: tf.Tensor, coefficient: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The share of each pixel, for `Mix`, and the share of the image, a float32 scalar."""
        mean = tf.cast(coefficient, tf.float32)
        if self._settings.rule not in (*BOX_RULES, "mixup_or_cutmix"):
            return mean, mean
        box = self._box(step, coefficient)
        area = tf.reduce_sum(tf.cast(box, tf.float64)) / (self._height * self._width)
        share, weight = _outside(box), tf.cast(1 - area, tf.float32)
        if self._settings.rule == "mixup_or_cutmix":
            cuts = tf.random.stateless_uniform([], self._stream(step, "which"), alg="philox") < 0.5
            share = tf.where(cuts, share, mean)
            weight = tf.where(cuts, weight, mean)
        return share, weight

    def _box(self, step: tf.Tensor, coefficient: tf.Tensor) -> tf.Tensor:
        """Which pixels are the partner's, bool `[H, W]`."""
        random = RowRandom(self._stream(step, "box"), 1, slice(0, 1))
        row = random.uniform("row", 0, self._height, tf.int32)[0]
        column = random.uniform("column", 0, self._width, tf.int32)[0]
        return box_mask(coefficient, row, column, self._height, self._width)

    def _coefficients(self, step: tf.Tensor, shape: tuple[int, ...] = ()) -> tf.Tensor:
        """Draws from `Beta(alpha, alpha)`, float64."""
        gamma = tf.random.stateless_gamma(
            [2, *shape],
            self._stream(step, "weight"),
            tf.constant(self._settings.alpha, tf.float64),
            dtype=tf.float64,
        )
        # With a tiny alpha both may underflow and be equal, which would mean a mixture of two
        # halves. Such an alpha nearly never mixes.
        equal = gamma[0] == gamma[1]
        return tf.where(equal, tf.ones_like(gamma[0]), gamma[0] / (gamma[0] + gamma[1]))

    def _partners(self, step: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Positions of the partners among this host's rows, int32 `[rows]`, within each group."""
        groups, seed = self._settings.groups, self._stream(step, "partners")
        size = self._batch_size // groups
        if self._settings.rule == "unimix":
            drawn = tf.random.stateless_uniform(
                [self._batch_size], seed, dtype=tf.float64, alg="philox"
            )
            weights = tf.gather(self._counts, labels) ** self._settings.sampling_power
            within = _draw_within(tf.reshape(drawn[self._rows], [-1, size]), weights)
            return tf.reshape(within + tf.range(tf.shape(within)[0])[:, None] * size, [-1])
        order = tf.random.stateless_uniform([groups, size], seed, None, None, tf.int32, "philox")
        within = tf.argsort(order, axis=1, stable=True)
        partners = tf.reshape(within + tf.range(groups)[:, None] * size, [self._batch_size])
        return partners[self._rows] - self._rows.start

    def _stream(self, step: tf.Tensor, name: str) -> tf.Tensor:
        return fold_in(stream_seed(self._seed, "mixup", step), stream_id(name))


def box_mask(
    coefficient: tf.Tensor, row: tf.Tensor, column: tf.Tensor, height: int, width: int
) -> tf.Tensor:
    """CutMix's box, bool `[H, W]`: sides are `sqrt(1 - coefficient)` of the image's.

    Args:
        coefficient: Share of the image outside the box before it is clipped, float64 scalar.
        row, column: Centre of the box, int32 scalars; the box is clipped at the image's border.
        height, width: Size of the image.
    """
    ratio = tf.sqrt(1 - coefficient)

    def inside(center: tf.Tensor, size: int) -> tf.Tensor:
        half = tf.cast(size * ratio, tf.int32) // 2
        position = tf.range(size)
        return (position >= center - half) & (position < center + half)

    return inside(row, height)[:, None] & inside(column, width)[None, :]


def _outside(box: tf.Tensor) -> tf.Tensor:
    """The share of an image in each pixel, float32 `[1, H, W, 1]`, whose box is the partner's."""
    return 1 - tf.cast(box, tf.float32)[None, :, :, None]


def relabel(
    weight: tf.Tensor,
    counts: tf.Tensor,
    other_counts: tf.Tensor,
    kappa: float,
    threshold: float,
) -> tf.Tensor:
    """Remix's share of the labels, float32 `[rows]`.

    If one class has at least `kappa` times as many examples as the other, the rarer class gets the
    whole label where the frequent one's share of the image is below `threshold`.

    Args:
        weight: Share of the row's own image, float32 scalar.
        counts, other_counts: Examples of the row's and of its partner's class, float64 `[rows]`.
        kappa, threshold: Parameters of Remix.
    """
    to_partner = (counts >= kappa * other_counts) & (weight < threshold)
    to_self = (kappa * counts <= other_counts) & (1 - weight < threshold)
    return tf.where(to_partner, 0.0, tf.where(to_self, 1.0, weight))


def mix_images(images: tf.Tensor, others: tf.Tensor | None, mix: Mix) -> tf.Tensor:
    """Mixes float images `[rows, H, W, 3]` with their partners, or with the `others` given."""
    if others is None:
        others = tf.gather(images, mix.partners)
    return mix.share * images + (1 - mix.share) * others


def _favour_rare(coefficients: tf.Tensor, counts: tf.Tensor, other_counts: tf.Tensor) -> tf.Tensor:
    """UniMix's coefficients, float32 `[rows]`: draws shifted by the partner's share of the counts.

    `Beta(a, a)` with `a < 1` is densest at 0 and 1, so the result is densest at that share.
    """
    return tf.cast((coefficients + other_counts / (counts + other_counts)) % 1, tf.float32)


def _draw_within(drawn: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Draws positions within each group with odds by weight, int32 `[groups, size]`.

    Args:
        drawn: Uniform numbers in [0, 1), float64 `[groups, size]`.
        weights: Weights of the rows, float64 `[groups * size]`.
    """
    bounds = tf.cumsum(tf.reshape(weights, tf.shape(drawn)), axis=1)
    bounds /= bounds[:, -1:]
    return tf.searchsorted(bounds[:, :-1], drawn, side="right")
