# SPDX-License-Identifier: Apache-2.0
"""The data sets by name, loaded, made long-tailed and checked."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from balpoe_jax.data import long_tail
from balpoe_jax.data.sources import ArraySource
from balpoe_jax.errors import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a complete data set holds.

    Attributes:
        num_classes: `C`.
        train_per_class: images of each class before the tail is cut.
        test_per_class: images of each class in the test set.
        image_shape: `(H, W, 3)`.
    """

    num_classes: int
    train_per_class: int
    test_per_class: int
    image_shape: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class LongTailed:
    """A long-tailed training set and its test set.

    Attributes:
        train: the kept images, class by class.
        test: the whole test set.
        test_names: str `[N]`, what lists of files call the test examples.
        held_out: labelled examples outside both, balanced as far as they go; None without any.
        held_out_description: where they are from.
        class_counts: int64 `[C]`, training images of each class.
        counts_as_published: False if the counts are not what the data set should have, which
            only `check_counts=False` lets through.
    """

    train: ArraySource
    test: ArraySource
    test_names: npt.NDArray[np.str_]
    held_out: ArraySource | None
    held_out_description: str
    class_counts: npt.NDArray[np.int64]
    counts_as_published: bool

    @property
    def num_classes(self) -> int:
        """Classes of the data set, whether or not they have examples."""
        return len(self.class_counts)


def published(
    name: str, imbalance_ratio: float
) -> tuple[npt.NDArray[np.int64], tuple[int, int, int]]:
    """Class counts int64 `[C]` and image shape `(H, W, 3)` of a complete long-tailed training set.

    Nothing is loaded.

    Raises:
        UserError (a `ValueError`): an unknown name, or a ratio out of range.
    """
    profile, _ = _look_up(name)
    counts = long_tail.exponential_counts(
        profile.num_classes, profile.train_per_class, imbalance_ratio
    )
    return counts, profile.image_shape


def load(
    name: str,
    imbalance_ratio: float,
    data_dir: str = "",
    check_counts: bool = True,
    selection_seed: int = 0,
    held_out_per_class: int = 0,
) -> LongTailed:
    """Loads a data set and cuts its tail by the exponential profile.

    Args:
        name: one of `DATASETS`.
        imbalance_ratio: largest over smallest training class, at least 1.
        data_dir: TFDS folder that holds the prepared data set; empty for TFDS's own default,
            into which it is downloaded when absent. Unused by "digits", which scikit-learn ships.
        check_counts: refuse a data set that is not complete. When False, the profile starts at
            the mean class size, as in the reference, and a class gives what it has.
        selection_seed: of the kept images; 0 is the published subset.
        held_out_per_class: training images a class that the selection leaves out, at most so many,
            are held out; the largest class is kept whole and has none.

    Raises:
        UserError (a `ValueError`): an unknown name, a data set that is not there, an empty class,
            a label out of range, or counts that differ.
    """
    profile, loader = _look_up(name)
    train, test = loader(data_dir)
    available = long_tail.class_counts(train.labels, profile.num_classes)
    found = available, long_tail.class_counts(test.labels, profile.num_classes)
    complete = all(
        (counts == expected).all()
        for counts, expected in zip(
            found, (profile.train_per_class, profile.test_per_class), strict=True
        )
    )
    if check_counts and not complete:
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
        f"{test.sum()} in all); prepare it anew, or pass --config.data.check_counts=False to use "
        "it as it is."
    )


def _look_up(name: str) -> tuple[Profile, Callable[[str], tuple[ArraySource, ArraySource]]]:
    if name not in DATASETS:
        raise UserError(f"Unknown data set {name!r}; choose from {', '.join(DATASETS)}.")
    return DATASETS[name]


_DIGITS_TEST_PER_CLASS = 40
_DIGITS_TRAIN_PER_CLASS = 130


def _load_digits(data_dir: str) -> tuple[ArraySource, ArraySource]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, cut into balanced halves.

    The test set is a seeded choice of 40 of each class; the training set the next 130 (a class has
    174 to 183).
    """
    del data_dir
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=-1)
    labels = digits.target.astype(np.int64)
    everything = ArraySource(images, labels, np.arange(len(labels)))
    both = _DIGITS_TEST_PER_CLASS + _DIGITS_TRAIN_PER_CLASS
    chosen = long_tail.select_indices(labels, [both] * 10).reshape(10, both)
    test, train = np.split(chosen, [_DIGITS_TEST_PER_CLASS], axis=1)
    # Sorted: the order of a data set is that of its original positions.
    return everything.select(np.sort(train.ravel())), everything.select(np.sort(test.ravel()))


def _load_cifar(name: str) -> Callable[[str], tuple[ArraySource, ArraySource]]:
    def load_splits(data_dir: str) -> tuple[ArraySource, ArraySource]:
        builder = _prepared_builder(name, data_dir)
        return _read_cifar(builder, "train"), _read_cifar(builder, "test")

    return load_splits


def _prepared_builder(name: str, data_dir: str) -> Any:
    """The TFDS builder of a data set that is on disk; downloads only into TFDS's own folder."""
    import tensorflow_datasets as tfds

    where = f" --data_dir={data_dir}" if data_dir else ""
    remedy = (
        f"prepare it with `tfds build {name}{where}`, or name the folder that holds it with "
        "--config.data.data_dir=DIR."
    )
    builder = tfds.builder(name, data_dir=data_dir or None)
    if builder.info.splits:
        return builder
    if data_dir:
        raise UserError(f"The data set {name} is not in {data_dir}; {remedy}")
    log.info("Downloading %s into %s", name, builder.data_dir)
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever the network and archive libraries below raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"The data set {name} is not in {builder.data_dir} and could not be downloaded "
            f"({reason}); {remedy}"
        ) from error
    return builder


def _read_cifar(builder: Any, split: str) -> ArraySource:
    """A whole split in memory, in the order of the original archive.

    TFDS shuffles its records, but an `id` such as "train_00042" tells the original position, on
    which the published selection depends.
    """
    import tensorflow_datasets as tfds

    records = builder.as_dataset(
        split=split, shuffle_files=False, decoders={"image": tfds.decode.SkipDecoding()}
    )
    decoded = records.map(
        lambda record: {
            "id": record["id"],
            "label": record["label"],
            "image": tf.io.decode_image(record["image"], channels=3, expand_animations=False),
        },
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    try:
        batches = list(decoded.batch(1024).as_numpy_iterator())
    except tf.errors.OpError as error:
        raise UserError(
            f"The {split} records in {builder.data_dir} cannot be read ({error.message}); remove "
            "that folder and prepare the data set anew."
        ) from error
    if not batches:
        raise UserError(f"The {split} split in {builder.data_dir} is empty; prepare it anew.")
    columns = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    keys = np.array([int(name.rsplit(b"_", 1)[-1]) for name in columns["id"]], np.int64)
    order = np.argsort(keys, kind="stable")
    source = ArraySource(columns["image"], columns["label"].astype(np.int64), keys)
    return source.select(order)


DATASETS: dict[str, tuple[Profile, Callable[[str], tuple[ArraySource, ArraySource]]]] = {
    "digits": (
        Profile(10, _DIGITS_TRAIN_PER_CLASS, _DIGITS_TEST_PER_CLASS, (8, 8, 3)),
        _load_digits,
    ),
    "cifar10": (Profile(10, 5000, 1000, (32, 32, 3)), _load_cifar("cifar10")),
    "cifar100": (Profile(100, 500, 100, (32, 32, 3)), _load_cifar("cifar100")),
}
