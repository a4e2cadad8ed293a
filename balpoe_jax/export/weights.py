# SPDX-License-Identifier: Apache-2.0
"""The weights alone as safetensors, by their paths in the network.

from safetensors.numpy import load_file
weights = load_file("model.safetensors")
"""

from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from balpoe_jax.errors import UserError
from balpoe_jax.files import reports_write_errors
from balpoe_jax.predictor import Predictor

FILE = "model.safetensors"


def write(predictor: Predictor, folder: Path) -> Path:
    """Writes `params` and `batch_stats`.

    Args:
        predictor: Restored run.
        folder: Folder of the file.

    Raises:
        UserError (a `ValueError`): safetensors is not installed, or the file cannot be written.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError(
            "Exporting weights needs the package safetensors, which is not installed; install it "
            "with pip install 'balpoe_jax[export]'."
        ) from error
    flat = traverse_util.flatten_dict(jax.device_get(predictor.variables), sep="/")
    path = folder / FILE
    with reports_write_errors(path):
        save_file({name: np.ascontiguousarray(value) for name, value in flat.items()}, path)
    return path
