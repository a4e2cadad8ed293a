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

# The name of a data set of image files, see `image_files`.
FOLDER = "folder"


def published(
    name: str, imbalance_ratio: float, image_size: int = 0
) -> tuple[npt.NDArray[np.int64], tuple[int, int, int]]:
    """Class counts int64 `[C]` and image shape `(H, W, 3)` of the complete training set.

    Nothing is loaded. The class sizes of photographs are not stored here, so their counts are even
    and have the published sum.

    Args:
        name: One of `DATASETS`.
        imbalance_ratio: Size of the largest class over the smallest; unused for photographs.
        image_size: Height and width in pixels of photographs.

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
    """Loads a data set that is or is made long-tailed, and checks its class counts.

    Args:
        name: One of `DATASETS`.
        imbalance_ratio: Size of the largest training class over the smallest, at least 1; unused
            for photographs.
        data_dir: Place of the data set: see `cifar.load` for CIFAR; a TFDS folder for photographs,
            or empty for TFDS's own. Unused by "digits", which scikit-learn ships.
        verify_counts: Whether a data set that is not the published one is an error.
        selection_seed: Seed of the selection from a balanced data set.
        held_out_per_class: Largest number of labelled images to hold out of each class, see
            `balanced.load_long_tailed` and `photos.load_photos`.
        image_size: Height and width in pixels of photographs; images of one size keep theirs.
        resize: Length in pixels of a test photograph's short side before the central crop.
        check_archive: Whether an archive of CIFAR without the published checksum is an error.

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
