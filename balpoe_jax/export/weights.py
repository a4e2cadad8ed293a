# SPDX-License-Identifier: Apache-2.0
"""The weights alone as safetensors, by their paths in the network.

from safetensors.numpy import load_file
weights = load_file("model.safetensors")
"""

from pathlib import Path

from balpoe_jax.predictor import Predictor
from balpoe_jax.run import weights_file


def write(predictor: Predictor, folder: Path) -> Path:
    """Writes `params` and `batch_stats`.

    Args:
        predictor: Restored run.
        folder: Folder of the file.

    Raises:
        UserError (a `ValueError`): safetensors is not installed, or the file cannot be written.
    """
    return weights_file.write(folder, predictor.variables)
