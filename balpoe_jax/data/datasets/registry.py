# SPDX-License-Identifier: Apache-2.0
"""The data sets by name, loaded and checked."""

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.datasets.balanced import BALANCED_DATASETS, load_long_tailed
from balpoe_jax.data.datasets.photos import PHOTO_DATASETS, load_photos
from balpoe_jax.data.datasets.types import LongTailed
from balpoe_jax.data.long_tail import exponential_counts
from balpoe_jax.errors import UserError

DATASETS = (*BALANCED_DATASETS, *PHOTO_DATASETS)


def published(
    name: str, imbalance_ratio: float, image_size: int = 0
) -> tuple[npt.NDArray[np.int64], tuple[int, int, int]]:
    """Class counts int64 `[C]` and image shape `(H, W, 3)` of the complete training set.

    Nothing is loaded. Of photographs, whose class sizes are not written down here, the counts have
    the published sum but are spread evenly.

    Args:
        name: one of `DATASETS`.
        imbalance_ratio: as for `load`.
        image_size: likewise.

    Raises:
        UserError (a `ValueError`): an unknown name, or a ratio out of range.
    """
    _check_name(name)
    if name in PHOTO_DATASETS:
        numbers = PHOTO_DATASETS[name]
        positions = np.arange(numbers.num_train) % numbers.num_classes
        return np.bincount(positions).astype(np.int64), (image_size, image_size, 3)
    profile, _ = BALANCED_DATASETS[name]
    counts = exponential_counts(profile.num_classes, profile.train_per_class, imbalance_ratio)
    return counts, profile.image_shape


def load(
    name: str,
    imbalance_ratio: float,
    data_dir: str = "",
    verify_counts: bool = True,
    selection_seed: int = 0,
    held_out_per_class: int = 0,
    image_size: int = 0,
    resize: int = 0,
    check_archive: bool = True,
) -> LongTailed:
    """Loads a data set, long-tailed by nature or made so, and checks its class counts.

    Args:
        name: one of `DATASETS`.
        imbalance_ratio: largest over smallest training class, at least 1; unused where it is given.
        data_dir: place of the data set: see `cifar.load` for CIFAR; a TFDS folder for photographs,
            or empty for TFDS's own. Unused by "digits", which scikit-learn ships.
        verify_counts: refuse a data set that is not the published one.
        selection_seed: of the images kept of a balanced data set.
        held_out_per_class: at most so many labelled images of each class are held out, see
            `balanced.load_long_tailed` and `photos.load_photos`.
        image_size: height and width in pixels of photographs; images of one size keep theirs.
        resize: short side in pixels to which test photographs are scaled before a central crop.
        check_archive: whether an archive of CIFAR with another checksum than the published one is
            refused.

    Raises:
        UserError (a `ValueError`): an unknown name, a data set that is not there or not as it
            should be.
    """
    _check_name(name)
    if name in PHOTO_DATASETS:
        return load_photos(name, image_size, resize, data_dir, verify_counts, held_out_per_class)
    return load_long_tailed(
        name,
        imbalance_ratio,
        data_dir,
        verify_counts,
        selection_seed,
        held_out_per_class,
        check_archive,
    )


def _check_name(name: str) -> None:
    if name not in DATASETS:
        raise UserError(f"Unknown data set {name!r}; choose from {', '.join(DATASETS)}.")
