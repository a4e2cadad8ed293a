# SPDX-License-Identifier: Apache-2.0
"""BatchNorm's statistics of averaged weights, which take the training images to make.

An evaluation keeps what it made, so that a prediction needs the run's folder alone.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from balpoe_jax.files import reports_write_errors, temporary

FILE = "averaged_statistics.npz"

_STEP = "step"


def save(folder: Path, step: int, statistics: Mapping[str, Any]) -> None:
    """Writes statistics as a whole or not at all.

    Args:
        folder: Folder of the predictions.
        step: Number of updates after which the weights were averaged.
        statistics: Collection `batch_stats` of the averaged weights.

    Raises:
        UserError (a `ValueError`): the file cannot be written.
    """
    flat: Any = jax.device_get(traverse_util.flatten_dict(dict(statistics), sep="/"))
    flat[_STEP] = np.int64(step)
    path, partial = folder / FILE, temporary(folder / FILE)
    with reports_write_errors(path):
        try:
            with partial.open("wb") as file:
                np.savez(file, **flat)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def load(folder: Path, step: int) -> dict[str, Any] | None:
    """The statistics after `step` updates; None where there are none, or those of another step.

    Args:
        folder: Folder of the predictions.
        step: Number of updates.
    """
    try:
        with (folder / FILE).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            flat = dict(stored)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    if flat.pop(_STEP, np.int64(-1)).tolist() != step:
        return None
    return traverse_util.unflatten_dict(flat, sep="/")
