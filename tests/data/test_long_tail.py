# SPDX-License-Identifier: Apache-2.0
"""Counts and kept images: the reference's, exactly."""

import re

import numpy as np
import pytest

from balpoe_jax.data.long_tail import (
    class_counts,
    exponential_counts,
    select_consecutive,
    select_indices,
)
from balpoe_jax.errors import UserError
from tests.helpers.golden import golden

# The stored selections: a shuffled data set of so many classes and images a class, and its seed.
SELECTIONS = {
    "v10/exp_f0.1_fwd": (10, 60, 4101),
    "v10/exp_f0.02_fwd": (10, 60, 4101),
    "v10/exp_f0.1_rev": (10, 60, 4101),
    "v100/exp_f0.05_fwd": (100, 20, 4102),
}


def _profiles() -> list[str]:
    return sorted(golden("counts"))


@pytest.mark.parametrize("name", _profiles())
def test_counts_are_the_references(name: str) -> None:
    match = re.fullmatch(r"c(\d+)_(?:train_exp_ir|test_(forward|backward))(\d+)", name)
    assert match
    classes, direction, ratio = int(match[1]), match[2], int(match[3])
    full = (1000 if direction else 5000) * 10 // classes
    counts = exponential_counts(classes, full, ratio, reverse=direction == "backward")
    np.testing.assert_array_equal(counts, golden("counts")[name])


def test_the_published_totals() -> None:
    """Tables of the paper: CIFAR-100 at ratio 100 has 10,847 images, CIFAR-10 12,406."""
    assert exponential_counts(100, 500, 100).sum() == 10_847
    assert exponential_counts(10, 5000, 100).sum() == 12_406


@pytest.mark.parametrize("name", SELECTIONS)
def test_selected_images_are_the_references(name: str) -> None:
    classes, per_class, seed = SELECTIONS[name]
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), per_class))
    case = golden(f"select/{name}")
    indices = select_indices(labels, case["counts"])
    np.testing.assert_array_equal(indices, case["indices"])


def test_selection_keeps_what_was_asked_once_and_follows_its_seed() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 500)
    counts = [40, 20, 10, 5, 0]
    first, second = select_indices(labels, counts), select_indices(labels, counts, seed=1)
    for indices in (first, second):
        assert len(set(indices)) == sum(counts)
        np.testing.assert_array_equal(class_counts(labels[indices], 5), counts)
        assert (np.diff(labels[indices]) >= 0).all()
    assert set(first) != set(second)
    np.testing.assert_array_equal(first, select_indices(labels, counts))


def test_consecutive_parts_are_disjoint_and_the_first_is_the_selection() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [9, 6, 4]))
    parts = select_consecutive(labels, ([4, 2, 1], [5, 3, 0], [0, 1, 3]), seed=5)
    np.testing.assert_array_equal(parts[0], select_indices(labels, [4, 2, 1], seed=5))
    together = select_indices(labels, [9, 6, 4], seed=5)
    assert sorted(np.concatenate(parts)) == sorted(together) == list(range(19))
    for part, counts in zip(parts, ([4, 2, 1], [5, 3, 0], [0, 1, 3]), strict=True):
        np.testing.assert_array_equal(np.bincount(labels[part], minlength=3), counts)
    with pytest.raises(UserError, match="Class 2 should keep 5 images but has only 4"):
        select_consecutive(labels, ([0, 0, 4], [0, 0, 1]))


def test_edges_of_the_profile() -> None:
    np.testing.assert_array_equal(exponential_counts(1, 7, 100), [7])
    np.testing.assert_array_equal(exponential_counts(4, 7, 1), [7] * 4)
    forward = exponential_counts(12, 80, 20)
    np.testing.assert_array_equal(exponential_counts(12, 80, 20, reverse=True), forward[::-1])


@pytest.mark.parametrize(
    ("labels", "counts", "message"),
    [
        ([0, 1, 5], [1, 1], "Labels must lie in 0..1, but 1 do not .*label 5 at position 2"),
        ([0, 1, -1], [1, 1], "label -1 at position 2"),
        ([0.0, 1.0], [1, 1], "integers"),
        ([0, 1, 1], [2, 1], "Class 0 should keep 2 images but has only 1"),
        ([0, 1], [1, -1], "must not be negative"),
    ],
)
def test_refuses_sets_that_do_not_fit(labels: list, counts: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_indices(labels, counts)


@pytest.mark.parametrize("numbers", [(0, 5, 10), (10, -1, 10), (10, 5, 0.5), (10, 5, np.nan)])
def test_refuses_profiles_that_do_not_exist(numbers: tuple) -> None:
    with pytest.raises(UserError, match="imbalance_ratio >= 1"):
        exponential_counts(*numbers)
