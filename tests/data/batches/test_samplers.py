# SPDX-License-Identifier: Apache-2.0
"""Samplers: how often, in which order, and as a function of which numbers."""

import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.config.settings import DataSettings
from balpoe_jax.data.batches import samplers
from balpoe_jax.data.pipeline import batch_indices, train_batches
from balpoe_jax.data.randomness import RowRandom, fold_in
from balpoe_jax.data.settings import SAMPLERS, Host, steps_per_epoch
from balpoe_jax.errors import UserError
from tests.helpers.batches import (
    PLAIN,
    assert_equal,
    join,
    make_settings,
    numbered_source,
    positions_of,
)

LABELS = np.array([3, 1, 0, 1, 0, 0, 1, 0, 0, 3, 0, 1, 0, 0, 0])  # 9, 4, none and 2
BATCH = 8


def orders(sampler: str, steps: range, **options) -> np.ndarray:
    """The batches of some steps, int `[steps, B]`."""
    dataset = samplers.batches(LABELS, BATCH, 7, steps.start, steps.stop, sampler, **options)
    return np.array([indices for _, indices in dataset.as_numpy_iterator()])


def chi_squared(observed: np.ndarray, odds: np.ndarray) -> float:
    expected = observed.sum() * odds / odds.sum()
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("exponent", [0.0, 1.0, -0.5])
def test_classes_are_drawn_by_their_counts_and_examples_evenly(exponent: float) -> None:
    random = RowRandom(tf.constant([1, 2]), 20_000, slice(0, 20_000))
    drawn = samplers.WeightedSampler(LABELS, exponent).draw(random).numpy()
    odds = np.bincount(LABELS)[LABELS] ** (exponent - 1)
    assert chi_squared(np.bincount(drawn, minlength=15), odds) < 36.1  # 99.9 % with 14 degrees


def test_one_class_and_one_example() -> None:
    random = RowRandom(tf.constant([1, 2]), 9, slice(2, 6))
    for labels, positions in ((np.zeros(5, int), set(range(5))), (np.array([4]), {0})):
        drawn = samplers.WeightedSampler(labels).draw(random).numpy()
        assert drawn.shape == (4,) and set(drawn) <= positions


@pytest.mark.integration
def test_class_balanced_epochs_draw_every_class_as_often() -> None:
    drawn = orders("class_balanced", range(1500))
    odds = 1 / np.bincount(LABELS)[LABELS]
    assert chi_squared(np.bincount(drawn.ravel()), odds) < 36.1
    assert len({tuple(row) for row in drawn[:50]}) == 50


@pytest.mark.parametrize("run", [1, 4])
def test_class_aware_epochs_give_every_class_its_turn(run: int) -> None:
    per_epoch = steps_per_epoch(len(LABELS), BATCH)
    seen = {label: [] for label in (0, 1, 3)}
    for order in orders("class_aware", range(30 * per_epoch), samples_per_class=run).reshape(
        30, -1
    ):
        turns = LABELS[order].reshape(-1, run)
        assert (turns == turns[:, :1]).all()
        rounds = turns[: len(turns) // 3 * 3, 0].reshape(-1, 3)
        np.testing.assert_array_equal(np.sort(rounds, axis=1), [[0, 1, 3]] * len(rounds))
        for label in seen:
            # Every example of a class once before one comes again.
            examples, size = order[LABELS[order] == label], (label == LABELS).sum()
            for start in range(0, len(examples), size):
                part = examples[start : start + size]
                assert len(set(part)) == len(part)
            seen[label].append(tuple(examples[:2]))
    assert all(len(set(pairs)) > 1 for pairs in seen.values())
    assert len(set(seen[0])) > 15


@pytest.mark.integration
def test_every_order_of_classes_and_examples_is_as_likely() -> None:
    make_order = samplers.ClassAwareOrder(np.array([0, 1, 2, 2, 2]), 9, 1)
    seeds = tf.data.Dataset.range(3000).map(lambda step: fold_in(tf.constant([1, 2]), step))
    found = np.array(list(seeds.map(lambda seed: make_order(seed, 5)).as_numpy_iterator()))
    labels = np.minimum(found, 2)
    for part in (labels[:, :3], labels[:, 3:6]):
        assert chi_squared(np.unique(part @ [9, 3, 1], return_counts=True)[1], np.ones(6)) < 20.5
    of_last = np.array([row[row >= 2] for row in found])
    counts = np.unique(of_last @ [9, 3, 1], return_counts=True)[1]
    assert len(counts) == 6 and chi_squared(counts, np.ones(6)) < 20.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_orders_are_a_function_of_the_step(sampler: str) -> None:
    whole = orders(sampler, range(9))
    np.testing.assert_array_equal(orders(sampler, range(5, 9)), whole[5:])
    assert not np.array_equal(whole[0], whole[2])


@pytest.mark.integration
@pytest.mark.slow_cases("class_balanced")
@pytest.mark.parametrize("sampler", SAMPLERS[1:])
def test_batches_are_made_of_what_the_sampler_says(sampler: str) -> None:
    source = numbered_source(21)
    settings = make_settings(**PLAIN, sampler=sampler, samples_per_class=2)
    batches = list(train_batches(source, settings, 2, 7))
    for step, batch in enumerate(batches, 2):
        indices = batch_indices(source.labels, settings, step)
        np.testing.assert_array_equal(positions_of(batch), indices)
        np.testing.assert_array_equal(batch.labels, source.labels[indices])
    halves = [list(train_batches(source, settings, 5, 7, Host(i, 2))) for i in range(2)]
    assert_equal(join(halves), batches[3:])


def test_refuses_what_is_not_valid() -> None:
    with pytest.raises(UserError, match="one of shuffle, class_balanced, class_aware; got 'fair'"):
        DataSettings(sampler="fair")
    with pytest.raises(UserError, match="samples_per_class must be from 1 to 1048576, got 0"):
        DataSettings(samples_per_class=0)
