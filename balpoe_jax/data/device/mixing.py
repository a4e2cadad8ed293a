# SPDX-License-Identifier: Apache-2.0
"""NumPy's draws for the mixing of a batch; `data.batches.mixing` describes the rules.

Labels and their shares are computed here. For the pixels, the plan has the share of the row's own
image, and the box in which the partner's pixels replace it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.device.orders import Labels, Positions, WeightedSampler
from balpoe_jax.data.device.randomness import generator
from balpoe_jax.data.settings import BOX_RULES, REMIX_RULES, TrainSettings, steps_per_epoch

Arrays = dict[str, Any]


class Mixer:
    """Draws how the batches of a training set are mixed.

    Args:
        labels: Classes of the training set, int `[N]`.
        image_shape: Shape of an image, `(H, W, 3)`.
        settings: Settings of the batches, with a positive `mix.alpha`.
    """

    def __init__(
        self, labels: Labels, image_shape: tuple[int, int, int], settings: TrainSettings
    ) -> None:
        self._labels, self._counts = labels, np.bincount(labels).astype(np.float64)
        self._height, self._width, _ = image_shape
        self._mix, self._size, self._seed = settings.mix, settings.batch_size, settings.seed
        self._per_epoch = steps_per_epoch(len(labels), settings.batch_size)
        self._sampler = (
            WeightedSampler(labels, self._mix.sampling_power) if self._mix.from_sampler else None
        )

    @property
    def cuts(self) -> bool:
        """Whether boxes are cut out of the partners."""
        return self._mix.rule in (*BOX_RULES, "mixup_or_cutmix", "mixup_and_cutmix")

    def draw(self, step: int, labels: npt.NDArray[np.int32]) -> tuple[Arrays, Arrays]:
        """Draws how the batch of a step is mixed.

        Args:
            step: Number of the step, from 0.
            labels: Classes of its rows, int32 `[B]`.

        Returns:
            Arrays for the pixels and arrays for the labels. For the pixels these are `share`
            float32 `[B]` of the row's own image; `partner` int32 `[B]`, rows of the batch or
            positions in the training set that a second sampler drew; and, if the rule has a box,
            `box` int16 `[B, 4]` (top, bottom, left, right), which shows only the partner. A box of
            the second view is `second_box`. For the labels they are `other_labels` int32 `[B]` and
            `weight` float32 `[B]`.
        """
        partner, others = self._partners(step, labels)
        share, weight, box = self._shares(step, labels, others)
        if not self._mixes(step):
            share, weight, others = np.ones_like(share), np.ones_like(weight), labels
            box = np.zeros_like(box)
        pixels = {"share": share, "partner": partner}
        if self.cuts:
            pixels["second_box" if self._mix.of_two_views else "box"] = box
        return pixels, {"other_labels": others, "weight": weight}

    def _mixes(self, step: int) -> bool:
        mix, epoch = self._mix, step // self._per_epoch
        if mix.always:
            return True
        if epoch < mix.first_epoch or (mix.last_epoch and epoch >= mix.last_epoch):
            return False
        return bool(self._random(step, "gate").random() < mix.probability)

    def _partners(
        self, step: int, labels: npt.NDArray[np.int32]
    ) -> tuple[Positions, npt.NDArray[np.int32]]:
        """The partner of each row, and its class."""
        random = self._random(step, "partners")
        if self._sampler is not None:
            drawn = self._sampler.draw(random, self._size)
            return drawn, self._labels[drawn].astype(np.int32)
        size = self._size // self._mix.groups
        first = np.repeat(np.arange(self._mix.groups) * size, size)
        if self._mix.rule == "unimix":
            weights = self._counts[labels] ** self._mix.sampling_power
            within = _draw_within(random, weights.reshape(-1, size))
        else:
            within = random.permuted(np.tile(np.arange(size), (self._mix.groups, 1)), axis=1)
        partner = (within.reshape(-1) + first).astype(np.int32)
        return partner, labels[partner]

    def _shares(
        self, step: int, labels: npt.NDArray[np.int32], others: npt.NDArray[np.int32]
    ) -> tuple[Any, Any, Any]:
        """Shares of the pixels and of the labels, and the box, of each row."""
        rule, rows = self._mix.rule, len(labels)
        counts, other_counts = self._counts[labels], self._counts[others]
        box = np.zeros((rows, 4), np.int16)
        if rule == "unimix":
            drawn = self._coefficients(step, rows)
            # Beta(a, a) with a < 1 is densest at 0 and 1, so this is at the partner's share.
            share = ((drawn + other_counts / (counts + other_counts)) % 1).astype(np.float32)
            return share, share, box
        coefficient = float(self._coefficients(step, 1)[0])
        share = np.full(rows, coefficient, np.float32)
        weight = share
        if rule in BOX_RULES or (rule == "mixup_or_cutmix" and self._cuts_now(step)):
            box[:], area = self._box(step, coefficient)
            share = np.ones(rows, np.float32)
            weight = np.full(rows, 1 - area, np.float32)
        elif self._mix.of_two_views:
            box[:], _ = self._box(step, coefficient)
        if rule in REMIX_RULES:
            weight = _relabel(
                weight, counts, other_counts, self._mix.remix_kappa, self._mix.remix_tau
            )
        return share, weight, box

    def _cuts_now(self, step: int) -> bool:
        return bool(self._random(step, "which").random() < 0.5)

    def _box(self, step: int, coefficient: float) -> tuple[tuple[int, int, int, int], float]:
        """CutMix's box (top, bottom, left, right), and its share of the image."""
        random = self._random(step, "box")
        edges: list[int] = []
        for size in (self._height, self._width):
            center, half = int(random.integers(size)), int(size * np.sqrt(1 - coefficient)) // 2
            edges += [max(0, center - half), min(size, center + half)]
        top, bottom, left, right = edges
        area = (bottom - top) * (right - left) / (self._height * self._width)
        return (top, bottom, left, right), area

    def _coefficients(self, step: int, number: int) -> npt.NDArray[np.float64]:
        """Draws from `Beta(alpha, alpha)`."""
        drawn = self._random(step, "weight").beta(self._mix.alpha, self._mix.alpha, number)
        # With a tiny alpha both gammas may underflow, to 0 / 0; such an alpha nearly never mixes.
        return np.where(np.isfinite(drawn), drawn, 1.0)

    def _random(self, step: int, name: str) -> np.random.Generator:
        return generator(self._seed, f"mixup {name}", step)


def _relabel(
    weight: npt.NDArray[np.float32],
    counts: npt.NDArray[np.float64],
    other_counts: npt.NDArray[np.float64],
    kappa: float,
    threshold: float,
) -> npt.NDArray[np.float32]:
    """Remix's share of the labels: the whole label goes to the rarer class, see `MixSettings`."""
    to_partner = (counts >= kappa * other_counts) & (weight < threshold)
    to_self = (kappa * counts <= other_counts) & (1 - weight < threshold)
    return np.where(to_partner, 0, np.where(to_self, 1, weight)).astype(np.float32)


def _draw_within(
    random: np.random.Generator, weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Draws positions within each group, with replacement and odds by weight, `[groups, size]`."""
    bounds = np.cumsum(weights, axis=1)
    bounds /= bounds[:, -1:]
    drawn = random.random(weights.shape)
    return np.stack(
        [np.searchsorted(b[:-1], d, side="right") for b, d in zip(bounds, drawn, strict=True)]
    )
