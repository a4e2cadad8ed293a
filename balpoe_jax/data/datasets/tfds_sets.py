# SPDX-License-Identifier: Apache-2.0
"""Any image-classification set that TFDS has prepared, divided as image files of one's own are."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.datasets import image_files
from balpoe_jax.data.datasets.listing import TEST, TRAIN, VALIDATION, Listing
from balpoe_jax.data.datasets.splitting import divide
from balpoe_jax.data.datasets.tfds_folder import prepared_builder
from balpoe_jax.data.datasets.types import LongTailed
from balpoe_jax.data.records import array_records, photographs, tfrecords
from balpoe_jax.data.records.sources import RecordSource, SmallSource, StoredSource
from balpoe_jax.errors import UserError

# The start of the name of such a data set in a config: `tfds:NAME`.
PREFIX = "tfds:"

# Features that name an example, the first that there is.
_NAMES = ("file_name", "image/filename", "filename", "id", "image_id")

# TFDS's names of splits, by ours.
_SPLITS = {TRAIN: ("train",), VALIDATION: ("validation", "val"), TEST: ("test",)}


@dataclasses.dataclass(frozen=True)
class TfdsSet:
    """The records of a prepared set.

    Attributes:
        listing: Names, labels, splits and classes of all examples.
        source: All examples, as photographs of one pixel.
        side: Height and width of all images, where they are squares of one size of at most
            `image_files.SMALL` pixels; else None.
    """

    listing: Listing
    source: RecordSource
    side: int | None

    def short_sides(self, positions: Sequence[int]) -> list[int]:
        """The shorter sides in pixels of some images, whose headers are read."""
        self.source.make_room()
        headers = (photographs.read_header(self.source.read_image(i)) for i in positions)
        return [min(header.height, header.width) for header in headers]


def open_set(name: str, data_dir: str = "") -> TfdsSet:
    """Opens the records of a prepared set; no image is read.

    Args:
        name: Name in TFDS, `NAME` or `NAME/CONFIG`.
        data_dir: TFDS folder; empty for TFDS's own, into which the set is downloaded.

    Raises:
        UserError (a `ValueError`): a set that is not there, or without images and labels of classes
            or a train split; files from which single images cannot be read.
    """
    builder = prepared_builder(name, data_dir)
    features = builder.info.features
    class_names = getattr(features["label"], "names", None) if "label" in features else None
    if class_names is None or "image" not in features:
        raise UserError(
            f"The data set {name} should have the features image and label, of named classes, and "
            f"has {', '.join(features)}; write it as a folder of images instead."
        )
    splits = {
        ours: builder.info.splits[theirs]
        for ours, candidates in _SPLITS.items()
        for theirs in candidates
        if theirs in builder.info.splits
    }
    if TRAIN not in splits:
        raise UserError(
            f"The data set {name} has no train split but {', '.join(builder.info.splits)}."
        )
    index, paths, of_example = _open_files(builder, splits, features)
    names = _names(index.names, of_example)
    listing = Listing(
        str(builder.data_dir), names, index.labels, tuple(of_example), tuple(class_names)
    )
    height, width, *_ = features["image"].shape
    is_small = height == width and height is not None and height <= image_files.SMALL
    return TfdsSet(listing, RecordSource(index, 1, 1, paths=paths), height if is_small else None)


def _open_files(
    builder: Any, splits: dict[str, Any], features: Any
) -> tuple[Any, tuple[str, ...], list[str]]:
    """Index of all files of the splits, their paths, and the split of each example."""
    name_feature = next((name for name in _NAMES if name in features), "")
    paths = [str(path) for split in splits.values() for path in split.filepaths]
    file_format = builder.info.file_format.value
    if file_format == "tfrecord":
        index: Any = tfrecords.load_index(paths, name_feature)
    elif file_format == "array_record":
        lengths = [length for split in splits.values() for length in split.shard_lengths]
        index = array_records.load_index(paths, name_feature, lengths)
    else:
        raise UserError(
            f"{builder.data_dir} holds {file_format} files, and no single image can be read from "
            "those; prepare the data set with `tfds build --file_format=array_record`."
        )
    of_file = [name for name, split in splits.items() for _ in split.filepaths]
    return index, tuple(paths), [of_file[file] for file in index.files]


def _names(stored: npt.NDArray[np.str_], splits: Sequence[str]) -> tuple[str, ...]:
    """Names by which examples are divided: as stored where these tell all apart, else numbers."""
    own = [f"{split}/{name}" for split, name in zip(splits, stored, strict=True)]
    if len(set(own)) == len(own):
        return tuple(own)
    return tuple(f"{split}/{i}" for i, split in enumerate(splits))


def load_set(
    name: str,
    data_dir: str = "",
    image_size: int = 0,
    resize: int = 0,
    test_share: float = image_files.TEST_SHARE,
    held_out_share: float = image_files.HELD_OUT_SHARE,
) -> LongTailed:
    """Opens and divides a prepared set.

    Args:
        name: Name in TFDS, `NAME` or `NAME/CONFIG`.
        data_dir: TFDS folder; empty for TFDS's own.
        image_size: Height and width in pixels of photographs; 0 for images of one small size.
        resize: Length in pixels of a test photograph's short side before the central crop.
        test_share, held_out_share: Shares of the images, see `splitting.divide`.

    Raises:
        UserError (a `ValueError`): as `open_set` and `image_files.refuse_untrained`; images of
            several sizes and no `image_size`.
    """
    found = open_set(name, data_dir)
    listing = found.listing
    parts = divide(listing, test_share, held_out_share)
    image_files.refuse_untrained(listing, parts, name)
    counts = image_files.count(listing, parts.train)
    image_files.announce(listing, parts, counts)
    side = found.side
    if not (image_size or side):
        raise UserError(
            f"config.data.image_size must be set, since {name} has no small images of one size."
        )

    def open_part(positions: npt.NDArray[np.int64]) -> StoredSource:
        source = found.source.select(positions)
        if image_size:
            return dataclasses.replace(source, image_size=image_size, resize=resize)
        assert side is not None
        return SmallSource.reading(dataclasses.replace(source, image_size=side, resize=side))

    test = open_part(parts.test)
    return LongTailed(
        train=open_part(parts.train),
        test=test,
        test_names=test.names,
        held_out=open_part(parts.held_out) if len(parts.held_out) else None,
        held_out_description=f"{len(parts.held_out):,} images: {parts.described[1]}",
        class_counts=counts,
        counts_as_published=False,
        class_names=listing.class_names,
    )
