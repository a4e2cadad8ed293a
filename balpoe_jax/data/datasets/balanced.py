# SPDX-License-Identifier: Apache-2.0
"""Balanced data sets that are made long-tailed by a selection: digits, CIFAR-10, CIFAR-100."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from balpoe_jax.data import long_tail
from balpoe_jax.data.datasets import cifar
from balpoe_jax.data.datasets.types import LongTailed
from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Profile:
    """The sizes of a complete data set.

    Attributes:
        num_classes: Number of classes, `C`.
        train_per_class: Training images of each class before the selection.
        test_per_class: Test images of each class.
        image_shape: Shape of an image, `(H, W, 3)`.
    """

    num_classes: int
    train_per_class: int
    test_per_class: int
    image_shape: tuple[int, int, int]


def load_long_tailed(
    name: str,
    imbalance_ratio: float,
    data_dir: str = "",
    verify_counts: bool = True,
    selection_seed: int = 0,
    held_out_per_class: int = 0,
    check_archive: bool = True,
) -> LongTailed:
    """Loads a balanced data set and keeps images by the exponential profile.

    Args:
        name: One of `BALANCED_DATASETS`.
        imbalance_ratio: Size of the largest training class over the smallest, at least 1.
        data_dir: Place of the data set, see `cifar.load`. Unused by "digits", which scikit-learn
            ships.
        verify_counts: Whether an incomplete data set is an error. If False, the profile starts at
            the mean class size, as in the reference, and a small class gives what it has.
        selection_seed: Seed of the selection; 0 gives the published subset.
        held_out_per_class: Largest number of images to hold out of each class, from those that the
            selection leaves out; the largest class is kept whole and has none.
        check_archive: Whether an archive needs the published checksum, see `cifar.load`.

    Raises:
        UserError (a `ValueError`): a data set that is not there, an empty class, a label out of
            range, or counts of an incomplete data set.
    """
    profile, loader = BALANCED_DATASETS[name]
    train, test = loader(data_dir, check_archive)
    available = long_tail.class_counts(train.labels, profile.num_classes)
    found = available, long_tail.class_counts(test.labels, profile.num_classes)
    complete = all(
        (counts == expected).all()
        for counts, expected in zip(
            found, (profile.train_per_class, profile.test_per_class), strict=True
        )
    )
    if verify_counts and not complete:
        raise UserError(_explain_counts(name, profile, *found))
    max_count = profile.train_per_class if complete else len(train) // profile.num_classes
    counts = long_tail.exponential_counts(profile.num_classes, max_count, imbalance_ratio)
    counts = np.minimum(counts, available)
    if (counts == 0).any():
        raise UserError(
            f"Class {np.argmin(counts)} of {name} would have no training image at imbalance ratio "
            f"{imbalance_ratio:g} with {max_count} in the largest; choose a smaller ratio."
        )
    held_out_counts = np.minimum(available - counts, held_out_per_class)
    chosen = long_tail.select_consecutive(train.labels, (counts, held_out_counts), selection_seed)
    held_out = train.select(chosen[1]) if len(chosen[1]) else None
    return LongTailed(
        train=train.select(chosen[0]),
        test=test,
        test_names=np.array([f"test_{key:05d}" for key in test.keys]),
        held_out=held_out,
        held_out_description=_describe_held_out(held_out_counts, held_out_per_class),
        class_counts=counts,
        counts_as_published=complete,
    )


def _describe_held_out(counts: npt.NDArray[np.int64], per_class: int) -> str:
    return (
        f"{counts.sum():,} training images that the long-tailed selection left out, up to "
        f"{per_class} a class; {(counts == 0).sum()} of {len(counts)} classes have none"
    )


def _explain_counts(
    name: str, profile: Profile, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]
) -> str:
    return (
        f"{name} should have {profile.train_per_class} training and {profile.test_per_class} test "
        f"images in each of {profile.num_classes} classes, but the one found has "
        f"{train.min()} to {train.max()} and {test.min()} to {test.max()} ({train.sum()} and "
        f"{test.sum()} in all); prepare it again, or pass --config.data.verify_counts=False to use "
        "it as it is."
    )


_DIGITS_TEST_PER_CLASS = 40
_DIGITS_TRAIN_PER_CLASS = 130


def _load_digits(data_dir: str, check_archive: bool) -> tuple[ArraySource, ArraySource]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, as balanced training and test sets.

    The test set is a seeded choice of 40 of each class; the training set the next 130 (a class has
    174 to 183).
    """
    del data_dir, check_archive
    values, labels = _read_digits()
    images = np.round(values * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=-1)
    everything = ArraySource(images, labels, np.arange(len(labels)))
    both = _DIGITS_TEST_PER_CLASS + _DIGITS_TRAIN_PER_CLASS
    chosen = long_tail.select_indices(labels, [both] * 10).reshape(10, both)
    test, train = np.split(chosen, [_DIGITS_TEST_PER_CLASS], axis=1)
    # Sorted: the order of a data set is that of its original positions.
    return everything.select(np.sort(train.ravel())), everything.select(np.sort(test.ravel()))


def _read_digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """scikit-learn's digits: values of 0 to 16, [1797, 8, 8], and labels, [1797].

    Importing scikit-learn takes longer than the first step of a training. So its file is read
    directly, and scikit-learn is imported only if the file is not where it should be.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is not None and spec.origin:
        path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            table = np.loadtxt(path, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


BALANCED_DATASETS: dict[
    str, tuple[Profile, Callable[[str, bool], tuple[ArraySource, ArraySource]]]
] = {
    "digits": (
        Profile(10, _DIGITS_TRAIN_PER_CLASS, _DIGITS_TEST_PER_CLASS, (8, 8, 3)),
        _load_digits,
    ),
    "cifar10": (Profile(10, 5000, 1000, (32, 32, 3)), cifar.loader("cifar10")),
    "cifar100": (Profile(100, 500, 100, (32, 32, 3)), cifar.loader("cifar100")),
}
