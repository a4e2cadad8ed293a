# SPDX-License-Identifier: Apache-2.0
"""A data set of image files of one's own: listed, divided, checked and opened.

Files are read where they lie. Images of one size of at most 64 pixels are trained on as CIFAR's
are, others as photographs.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from balpoe_jax.data import long_tail
from balpoe_jax.data.datasets import file_checks
from balpoe_jax.data.datasets.listing import (
    Listing,
    read_class_names,
    read_folder,
    read_lists,
    some,
)
from balpoe_jax.data.datasets.splitting import LEAST, Parts, divide
from balpoe_jax.data.datasets.types import LongTailed
from balpoe_jax.data.records.sources import FileIndex, FileSource, SmallSource, StoredSource
from balpoe_jax.errors import UserError

log = logging.getLogger(__name__)

Indices = npt.NDArray[np.int64]

# Largest side of images that are small: read as pixels, and cropped with a margin.
SMALL = 64

# Shares of the images of a set that has no splits.
TEST_SHARE, HELD_OUT_SHARE = 0.2, 0.1

# With fewer held-out images a temperature is little more than chance.
_FEW_HELD_OUT = 50


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a data set of image files is, and how it is divided.

    Attributes:
        folder: Folder of class folders, or of the paths in lists; empty for the lists' folders.
        lists: Paths of lists by split, see `listing.read_lists`; empty for a folder of class
            folders.
        class_names: File of the classes' names; empty for those of folders and lists.
        test_share: Share of the images that becomes the test set, where there is none.
        held_out_share: Share of the images that is held out.
    """

    folder: str
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)
    class_names: str = ""
    test_share: float = TEST_SHARE
    held_out_share: float = HELD_OUT_SHARE

    @property
    def where(self) -> str:
        """The place in words."""
        return some(self.lists.values()) if self.lists else self.folder

    def listing(self) -> Listing:
        """The files with their classes; none is opened.

        Raises:
            UserError (a `ValueError`): as `listing.read_folder` and `listing.read_lists`.
        """
        names = read_class_names(self.class_names) if self.class_names else ()
        if self.lists:
            return read_lists(self.lists, self.folder, names)
        return read_folder(self.folder, names)


def parse_lists(text: str) -> dict[str, str]:
    """Lists by split, from `FILE` or `train=FILE;val=FILE;test=FILE`.

    Args:
        text: Value of `data.lists`.

    Raises:
        UserError (a `ValueError`): a split of another name, or one that is named twice.
    """
    lists: dict[str, str] = {}
    for part in filter(None, text.split(";")):
        split, equals, path = part.partition("=")
        if not equals:
            split, path = "", part
        if split not in ("", "train", "val", "test") or split in lists or not path:
            raise UserError(
                "config.data.lists must be FILE or train=FILE;val=FILE;test=FILE, each once, got "
                f"{text[:80]!r}."
            )
        lists[split] = path
    return lists


def is_small(facts: file_checks.FileFacts) -> bool:
    """Whether all images are squares of one size of at most `SMALL` pixels."""
    size = facts.one_size
    return size is not None and size[0] == size[1] <= SMALL


def load_files(
    place: Place,
    image_size: int = 0,
    resize: int = 0,
    refuses_shared: bool = True,
    threads: int | None = None,
) -> LongTailed:
    """Lists, divides and checks a data set of image files.

    Args:
        place: Where it is.
        image_size: Height and width in pixels of photographs; 0 for images of one small size.
        resize: Length in pixels of a test photograph's short side before the central crop.
        refuses_shared: Whether copies of test and held-out images are left out of training, or, in
            splits that were given, are an error.
        threads: Number of files that are opened at once; None for the default.

    Raises:
        UserError (a `ValueError`): as `Place.listing` and `file_checks.examine`; a class that has
            test images and none for training; an image in two splits; no test image; images of
            several sizes and no `image_size`.
    """
    listing = place.listing()
    parts = divide(listing, place.test_share, place.held_out_share)
    refuse_untrained(listing, parts, place.where)
    facts = file_checks.examine(listing.root, listing.names, place.where, threads)
    if refuses_shared:
        parts = _without_copies(listing, facts, parts)
        refuse_untrained(listing, parts, place.where)
    counts = count(listing, parts.train)
    announce(listing, parts, counts)
    open_part = _opener(listing, facts, image_size, resize)
    held_out = open_part(parts.held_out) if len(parts.held_out) else None
    return LongTailed(
        train=open_part(parts.train),
        test=open_part(parts.test),
        test_names=facts.names[parts.test],
        held_out=held_out,
        held_out_description=f"{len(parts.held_out):,} images: {parts.described[1]}",
        class_counts=counts,
        counts_as_published=False,
        class_names=listing.class_names,
    )


def count(listing: Listing, positions: Indices) -> Indices:
    """Images of each class at some positions of a listing, int64 `[C]`."""
    return long_tail.class_counts(listing.labels[positions], len(listing.class_names))


def _without_copies(listing: Listing, facts: file_checks.FileFacts, parts: Parts) -> Parts:
    """Leaves copies of test and held-out images out of the other parts.

    Where both parts were given, a copy is an error: the user can tell which one is wrong.
    """
    held_out, train = parts.held_out, parts.train
    names = listing.names

    def without(part: str, positions: Indices, other: str, of: Indices, by_hash: bool) -> Indices:
        found = file_checks.copies(facts, positions, of)
        pairs = some(f"{names[i]} ({part}) and {names[j]} ({other})" for i, j in found.items())
        if found and not by_hash:
            raise UserError(
                f"An image should be in one split, and {len(found):,} are in two: {pairs}; remove "
                "one of each, or pass --config.data.verify_counts=False to train anyway."
            )
        if found:
            log.info("Left out, since they are copies of images in another part: %s", pairs)
        return positions[~np.isin(positions, list(found))]

    held_out = without("held-out", held_out, "test", parts.test, parts.test_by_hash)
    train = without("train", train, "test", parts.test, parts.test_by_hash)
    train = without("train", train, "held-out", held_out, parts.held_out_by_hash)
    return dataclasses.replace(parts, train=train, held_out=held_out)


def refuse_untrained(listing: Listing, parts: Parts, where: str) -> None:
    """Raises UserError unless there are test images, and training images of each class.

    Args:
        listing: All images.
        parts: Parts of the listing.
        where: Place of the images, for messages.
    """
    counts = count(listing, parts.train)
    if len(counts) < 2:
        raise UserError(
            f"{where} should have images of two classes or more, and all are of "
            f"{listing.class_names[0]!r}; add a class."
        )
    if not len(parts.test):
        raise UserError(
            f"{where} has {len(listing):,} images, and none of them is left for a test; add images "
            "or a test split, or raise config.data.test_share."
        )
    without = [listing.class_names[i] for i in np.flatnonzero(counts == 0)]
    if without:
        raise UserError(
            f"Each class of {where} should have training images, and {len(without)} of "
            f"{len(counts)} have none: {some(without)}; add some, or remove these classes."
        )


def _opener(
    listing: Listing, facts: file_checks.FileFacts, image_size: int, resize: int
) -> Callable[[npt.NDArray[np.int64]], StoredSource]:
    if not image_size and not is_small(facts):
        size = facts.one_size
        found = f"{size[1]} x {size[0]} pixels" if size else "of several sizes"
        raise UserError(
            f"config.data.image_size must be set, since the images are {found}; the size in a "
            f"batch is that of the files only for squares of at most {SMALL} pixels."
        )

    def open_part(positions: npt.NDArray[np.int64]) -> StoredSource:
        index = FileIndex(facts.names[positions], listing.labels[positions])
        if image_size:
            return FileSource(index, image_size, resize, root=listing.root)
        side = int(facts.heights[0])
        return SmallSource.reading(FileSource(index, side, side, root=listing.root))

    return open_part


def announce(listing: Listing, parts: Parts, counts: npt.NDArray[np.int64]) -> None:
    """Logs the sizes of the parts, classes that are trained on whole, and the class counts.

    Args:
        listing: All images.
        parts: Parts of the listing.
        counts: Training images of each class, int `[C]`.
    """
    log.info(
        "%s: %s images for training, %s for the test (%s), %s held out (%s)",
        listing.root,
        *(f"{len(parts.train):,}", f"{len(parts.test):,}", parts.described[0]),
        *(f"{len(parts.held_out):,}", parts.described[1]),
    )
    if parts.whole:
        described = (f"{listing.class_names[i]} ({counts[i]})" for i in parts.whole)
        log.info(
            "Trained on whole, without test images, since fewer than %d images or none would be "
            "left for training or test: %s",
            LEAST,
            some(described, 10),
        )
    if 0 < len(parts.held_out) < _FEW_HELD_OUT:
        log.warning(
            "Temperatures will be fitted on %d held-out images, which is few: calibrated "
            "probabilities may be far off; raise config.data.held_out_share, or add images",
            len(parts.held_out),
        )
    log.info("%s", histogram(counts, listing.class_names))


def histogram(counts: npt.NDArray[np.int64], names: Sequence[str], lines: int = 12) -> str:
    """The numbers of training images as bars of text: of all classes, or of some in their order.

    Args:
        counts: Training images of each class, int `[C]`.
        names: Names of the classes.
        lines: Largest number of classes to show.
    """
    order = np.argsort(-counts, kind="stable")
    if len(order) > lines:
        order = order[np.unique(np.linspace(0, len(order) - 1, lines).round().astype(int))]
    width = min(24, max(len(names[i]) for i in order))
    shown = [
        f"  {names[i][:width]:<{width}} {counts[i]:>8,} {'#' * _bar(counts[i], counts.max())}"
        for i in order
    ]
    title = "Training images by class" + (
        f" ({lines} of {len(counts)} classes, from the largest to the smallest)"
        if len(counts) > lines
        else ""
    )
    return "\n".join([title, *shown])


def _bar(count: int, most: int, length: int = 40) -> int:
    return max(1, round(length * count / most))
