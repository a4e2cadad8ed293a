# SPDX-License-Identifier: Apache-2.0
"""StableHLO by `jax.export`: one file for CPUs, CUDA and TPUs, which JAX alone runs.

exported = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
found = exported.call(images)
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

from balpoe_jax.files import reports_write_errors
from balpoe_jax.predictor import Predictor

FILE = "model.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def write(predictor: Predictor, folder: Path) -> Path:
    """Writes the program with its weights.

    Args:
        predictor: Restored run.
        folder: Folder of the file.

    Raises:
        UserError (a `ValueError`): the file cannot be written.
    """
    side = predictor.image_size
    shape = export.symbolic_shape(f"n, {side}, {side}, 3")
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    exported = export.export(jax.jit(predictor.as_function()), platforms=PLATFORMS)(images)
    path = folder / FILE
    with reports_write_errors(path):
        path.write_bytes(exported.serialize())
    return path
