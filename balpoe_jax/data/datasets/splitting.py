# SPDX-License-Identifier: Apache-2.0
"""Test and held-out images of a set that comes without: chosen by a hash of their names.

A name's hash is a number in [0, 1) that never changes, and thresholds decide. Adding images
therefore moves no other image from one part to another. Shares hold in expectation.
"""

import dataclasses
import hashlib
import os

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.datasets.listing import TEST, TRAIN, VALIDATION, Listing

# Size below which a class is not divided.
LEAST = 5

Indices = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a listing.

    Attributes:
        train, test, held_out: Positions in the listing, int64; no image is in two of them.
        whole: Classes that are trained on with all images, since too few would be left of them:
            no training or no test image, or fewer than `LEAST` in all.
        test_by_hash, held_out_by_hash: Whether these parts were chosen by names.
        described: Where test and held-out images come from.
    """

    train: Indices
    test: Indices
    held_out: Indices
    whole: tuple[int, ...]
    test_by_hash: bool
    held_out_by_hash: bool
    described: tuple[str, str]


def position(name: str) -> float:
    """The place of a name in [0, 1): its SHA-256's first 53 bits.

    Args:
        name: Path below the folder of the set, with `/` between folders.
    """
    return (int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") >> 11) / 2**53


def divide(listing: Listing, test_share: float, held_out_share: float) -> Parts:
    """Divides a listing by its splits, and by names where it has none.

    Test images are those of `test`; of `val` where there is no `test`; and otherwise those with
    the lowest positions. Held-out images are those of `val` where `test` is there too, and
    otherwise those of the training images with the next positions.

    Args:
        listing: Image files with classes.
        test_share: Share of the images that becomes the test set, where there is none.
        held_out_share: Share of the images that is held out for temperatures and thresholds.
    """
    splits, labels = np.array(listing.splits), listing.labels
    given = set(listing.splits)
    places = np.array([position(name) for name in listing.names])
    test_by_hash = not given & {TEST, VALIDATION}
    if test_by_hash:
        candidates = np.ones(len(listing), bool)
        is_test, low = places < test_share, test_share
        about_test = f"{100 * test_share:g}% of the images, by a hash of their names"
    else:
        of_test = TEST if TEST in given else VALIDATION
        candidates = np.isin(splits, [TRAIN, ""])
        is_test, low = splits == of_test, 0.0
        about_test = f"the images of {of_test}"
    if {TEST, VALIDATION} <= given:
        is_held_out = splits == VALIDATION
        about_held_out = f"the images of {VALIDATION}"
    else:
        is_held_out = candidates & (places >= low) & (places < low + held_out_share)
        about_held_out = f"{100 * held_out_share:g}% of the images, by a hash of their names"

    def count(chosen: npt.NDArray[np.bool_]) -> Indices:
        return np.bincount(labels[candidates & chosen], minlength=len(listing.class_names))

    own, tested = count(candidates), count(is_test)
    left = own - count(is_test | is_held_out)
    whole = (own > 0) & ((own < LEAST) | (left == 0) | (test_by_hash & (tested == 0)))
    divided = ~(candidates & whole[labels])
    is_test &= divided
    is_held_out &= divided
    return Parts(
        train=np.flatnonzero(candidates & ~is_test & ~is_held_out),
        test=np.flatnonzero(is_test),
        held_out=np.flatnonzero(is_held_out),
        whole=tuple(int(label) for label in np.flatnonzero(whole)),
        test_by_hash=test_by_hash,
        held_out_by_hash=not {TEST, VALIDATION} <= given,
        described=(about_test, about_held_out),
    )
