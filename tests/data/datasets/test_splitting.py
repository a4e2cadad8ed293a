# SPDX-License-Identifier: Apache-2.0
"""Splits by a hash of names: they hold in expectation, and no image ever moves."""

import numpy as np
import pytest

from balpoe_jax.data.datasets.listing import Listing
from balpoe_jax.data.datasets.splitting import divide, position


def listing(sizes: list[int], splits: tuple[str, ...] = ("",)) -> Listing:
    names, labels, of = [], [], []
    for label, size in enumerate(sizes):
        for number in range(size):
            names.append(f"class{label}/image{number}.jpg")
            labels.append(label)
            of.append(splits[number % len(splits)])
    classes = tuple(f"class{label}" for label in range(len(sizes)))
    return Listing("/photos", tuple(names), np.array(labels, np.int64), tuple(of), classes)


def names_of(photos: Listing, positions: np.ndarray) -> set[str]:
    return {photos.names[i] for i in positions}


def test_positions_are_those_of_sha_256() -> None:
    """A second derivation: the digest's first 53 bits, by `sha256sum`."""
    # printf class0/image0.jpg | sha256sum
    assert position("a") == pytest.approx(0xCA978112CA1BBDCA / 2**64, abs=1e-15)
    assert 0 <= position("class0/image0.jpg") < 1
    assert position("b") != position("a")


def test_shares_hold_in_expectation_and_parts_are_disjoint() -> None:
    photos = listing([4000, 3000, 3000])
    parts = divide(photos, 0.2, 0.1)
    sizes = [len(part) for part in (parts.train, parts.test, parts.held_out)]
    assert (
        sum(sizes) == 10_000 == len(set(np.concatenate([parts.train, parts.test, parts.held_out])))
    )
    np.testing.assert_allclose(np.array(sizes) / 10_000, [0.7, 0.2, 0.1], atol=4 * 0.005)
    assert parts.whole == ()


def test_adding_images_moves_no_other_image() -> None:
    few, many = listing([60, 30]), listing([900, 400, 50])
    for name in ("train", "test", "held_out"):
        before = names_of(few, getattr(divide(few, 0.2, 0.1), name))
        after = names_of(many, getattr(divide(many, 0.2, 0.1), name))
        assert before <= after, name


def test_a_larger_test_share_keeps_what_was_in_the_test() -> None:
    photos = listing([300])
    small, large = (divide(photos, share, 0.1) for share in (0.1, 0.3))
    assert set(small.test) < set(large.test)


def test_small_classes_are_trained_on_whole_and_named() -> None:
    photos = listing([200, 4, 1, 5])
    parts = divide(photos, 0.2, 0.1)
    assert set(parts.whole) >= {1, 2}
    counts = np.bincount(photos.labels[parts.train], minlength=4)
    for label in parts.whole:
        assert counts[label] == [200, 4, 1, 5][label]
        assert label not in photos.labels[np.concatenate([parts.test, parts.held_out])]
    assert counts[0] < 200


def test_a_class_without_training_or_test_images_is_trained_on_whole() -> None:
    photos = listing([200, 8])
    in_test = [name for name in photos.names if name.startswith("class1")]
    share = max(position(name) for name in in_test) + 1e-9  # all of the class are below
    parts = divide(photos, share, 0.0)
    assert 1 in parts.whole and (photos.labels[parts.train] == 1).sum() == 8
    none = divide(photos, min(position(name) for name in in_test), 0.0)
    assert 1 in none.whole


def test_given_splits_are_kept() -> None:
    photos = listing([40, 40], ("train", "val", "test", "train"))
    parts = divide(photos, 0.9, 0.9)
    for name, split in (("train", "train"), ("test", "test"), ("held_out", "val")):
        chosen = getattr(parts, name)
        assert {photos.splits[i] for i in chosen} == {split}
        assert len(chosen) == photos.splits.count(split)
    assert parts.described == ("the images of test", "the images of val")


def test_val_is_the_test_where_there_is_no_other_and_a_slice_is_held_out() -> None:
    photos = listing([400, 400], ("train", "val"))
    parts = divide(photos, 0.2, 0.1)
    assert {photos.splits[i] for i in parts.test} == {"val"} and len(parts.test) == 400
    assert {photos.splits[i] for i in parts.held_out} == {"train"}
    assert 20 < len(parts.held_out) < 60
    assert len(parts.train) + len(parts.held_out) == 400


def test_small_classes_with_a_test_split_keep_it() -> None:
    photos = listing([100, 6], ("train", "test"))
    parts = divide(photos, 0.2, 0.5)
    assert 1 in parts.whole  # three training images
    assert (photos.labels[parts.test] == 1).sum() == 3
    assert (photos.labels[parts.train] == 1).sum() == 3
