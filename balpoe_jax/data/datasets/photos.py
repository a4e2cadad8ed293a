# SPDX-License-Identifier: Apache-2.0
"""Photographs that are long-tailed by themselves: ImageNet-LT and iNaturalist 2018, from TFDS."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from balpoe_jax.data import long_tail
from balpoe_jax.data.datasets.tfds_folder import prepared_builder
from balpoe_jax.data.datasets.types import LongTailed
from balpoe_jax.data.records import array_records, tfrecords
from balpoe_jax.data.records.array_records import ArrayRecordIndex
from balpoe_jax.data.records.sources import RecordSource
from balpoe_jax.data.records.tfrecords import RecordIndex
from balpoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PhotoDataset:
    """The sizes of a published data set, and its splits and features in TFDS.

    Attributes:
        num_classes: Number of classes, `C`.
        num_train, largest, smallest: Training images in all, in the largest and smallest class.
        num_test: Test images in all; each class has the same number.
        test: Split that results are reported on.
        held_out: Labelled split outside training and test; empty where there is none.
        name_feature: Feature that identifies an example.
    """

    num_classes: int
    num_train: int
    largest: int
    smallest: int
    num_test: int
    test: str
    held_out: str
    name_feature: str


PHOTO_DATASETS = {
    "imagenet_lt": PhotoDataset(1000, 115_846, 1280, 5, 50_000, "test", "validation", "file_name"),
    # Its test split has no labels; results are reported on the validation split.
    "i_naturalist2018": PhotoDataset(8142, 437_513, 1000, 2, 24_426, "validation", "", "id"),
}


def load_photos(
    name: str,
    image_size: int,
    resize: int,
    data_dir: str = "",
    verify_counts: bool = True,
    held_out_per_class: int = 0,
) -> LongTailed:
    """Opens a data set of photographs; the images stay in their files until they are needed.

    Args:
        name: One of `PHOTO_DATASETS`.
        image_size: Height and width in pixels of the images in a batch.
        resize: Length in pixels of a test image's short side before the central crop.
        data_dir: TFDS folder; empty for TFDS's own.
        verify_counts: Whether an incomplete data set is an error. If False, a class may be empty in
            the test set, but not in training.
        held_out_per_class: Largest number of images of each class, the first ones, to take from the
            held-out split.

    Raises:
        UserError (a `ValueError`): a data set that is not there, prepared in another format, or
            not as published; an empty training class.
    """
    published = PHOTO_DATASETS[name]
    builder = prepared_builder(name, data_dir)

    def split(part: str) -> RecordSource:
        paths, index = _open_split(builder, part, published.name_feature)
        return RecordSource(index, image_size, resize, paths=paths)

    train, test = split("train"), split(published.test)
    counts = long_tail.class_counts(train.labels, published.num_classes)
    test_counts = long_tail.class_counts(test.labels, published.num_classes)
    complete = _is_complete(published, counts, test_counts)
    if verify_counts and not complete:
        raise UserError(_explain_counts(name, published, counts, test_counts))
    if (counts == 0).any():
        raise UserError(
            f"Class {np.argmin(counts)} of the {name} in {builder.data_dir} has no training image; "
            "every class must have one."
        )
    held_out, description = None, ""
    if published.held_out and held_out_per_class:
        held_out = _first_of_each_class(split(published.held_out), held_out_per_class)
        description = (
            f"{len(held_out):,} images of the {published.held_out} split, up to "
            f"{held_out_per_class} a class"
        )
    return LongTailed(train, test, test.index.names, held_out, description, counts, complete)


def _open_split(
    builder: Any, part: str, name_feature: str
) -> tuple[tuple[str, ...], RecordIndex | ArrayRecordIndex]:
    if part not in builder.info.splits:
        raise UserError(
            f"{builder.data_dir} has no {part} split but {', '.join(builder.info.splits)}; prepare "
            "the data set again."
        )
    split, file_format = builder.info.splits[part], builder.info.file_format.value
    paths = tuple(str(path) for path in split.filepaths)
    if file_format == "tfrecord":
        return paths, tfrecords.load_index(paths, name_feature)
    if file_format == "array_record":
        return paths, array_records.load_index(paths, name_feature, split.shard_lengths)
    raise UserError(
        f"{builder.data_dir} holds {file_format} files, and no single image can be read from "
        "those; prepare the data set with `tfds build --file_format=array_record`."
    )


def _is_complete(
    published: PhotoDataset, counts: npt.NDArray[np.int64], test_counts: npt.NDArray[np.int64]
) -> bool:
    found = (counts.sum(), counts.max(), counts.min())
    expected = (published.num_train, published.largest, published.smallest)
    per_class = published.num_test // published.num_classes
    return found == expected and bool((test_counts == per_class).all())


def _explain_counts(
    name: str,
    published: PhotoDataset,
    counts: npt.NDArray[np.int64],
    test_counts: npt.NDArray[np.int64],
) -> str:
    return (
        f"{name} should have {published.num_train} training images, {published.largest} to "
        f"{published.smallest} a class, and {published.num_test} test images, but the one found "
        f"has {counts.sum()}, {counts.max()} to {counts.min()}, and {test_counts.sum()}; prepare "
        "it again, or pass --config.data.verify_counts=False to use it as it is."
    )


def _first_of_each_class(source: RecordSource, per_class: int) -> RecordSource:
    order = np.argsort(source.labels, kind="stable")
    labels = source.labels[order]
    rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
    return source.select(np.sort(order[rank < per_class]))
