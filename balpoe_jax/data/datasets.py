# SPDX-License-Identifier: Apache-2.0
"""The data sets by name, loaded and checked."""

from balpoe_jax.data.balanced import BALANCED, load_cut
from balpoe_jax.data.natural import NATURAL, load_natural
from balpoe_jax.data.splits import LongTailed
from balpoe_jax.errors import UserError

DATASETS = (*BALANCED, *NATURAL)


def load(
    name: str,
    imbalance_ratio: float,
    data_dir: str = "",
    check_counts: bool = True,
    selection_seed: int = 0,
    held_out_per_class: int = 0,
    image_size: int = 0,
    resize: int = 0,
) -> LongTailed:
    """Loads a data set, long-tailed by nature or made so, and checks its class counts.

    Args:
        name: one of `DATASETS`.
        imbalance_ratio: largest over smallest training class, at least 1; unused where it is given.
        data_dir: TFDS folder that holds the prepared data set; empty for TFDS's own default,
            into which it is downloaded when absent. Unused by "digits", which scikit-learn ships.
        check_counts: refuse a data set that is not the published one.
        selection_seed: of the images kept of a balanced data set.
        held_out_per_class: at most so many labelled images of each class are held out, see
            `balanced.load_cut` and `natural.load_natural`.
        image_size: height and width in pixels of photographs; images of one size keep theirs.
        resize: short side in pixels to which test photographs are scaled before a central crop.

    Raises:
        UserError (a `ValueError`): an unknown name, a data set that is not there or not as it
            should be.
    """
    if name not in DATASETS:
        raise UserError(f"Unknown data set {name!r}; choose from {', '.join(DATASETS)}.")
    if name in NATURAL:
        return load_natural(name, image_size, resize, data_dir, check_counts, held_out_per_class)
    return load_cut(
        name, imbalance_ratio, data_dir, check_counts, selection_seed, held_out_per_class
    )
