# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's SavedModel by `jax2tf`, with a signature `serving_default` for uint8 images.

program = tf.saved_model.load("saved_model").signatures["serving_default"]
found = program(images=images)
"""

import shutil
from pathlib import Path
from typing import Any

import jax

from balpoe_jax.data import extras
from balpoe_jax.errors import UserError
from balpoe_jax.files import reports_write_errors
from balpoe_jax.predictor import Predictor

FOLDER = "saved_model"


def write(predictor: Predictor, folder: Path) -> Path:
    """Writes the program with its weights.

    Args:
        predictor: Restored run.
        folder: Folder of the folder `saved_model`.

    Raises:
        UserError (a `ValueError`): TensorFlow is not installed, or does not run the network, or the
            files cannot be written.
    """
    extras.require_tensorflow("Exporting a SavedModel")
    import tensorflow as tf
    from jax.experimental import jax2tf

    side = predictor.image_size
    converted = jax2tf.convert(
        predictor.as_function_of_variables(),
        polymorphic_shapes=[None, f"(n, {side}, {side}, 3)"],
        with_gradient=False,
        native_serialization_platforms=("cpu", "cuda", "tpu"),
    )
    images = tf.TensorSpec([None, side, side, 3], tf.uint8, name="images")
    module = tf.Module()
    # No constants of the program: TensorFlow's compiler folds them, which takes a ResNeXt 18 GB.
    weights = jax.tree.map(tf.Variable, jax.device_get(predictor.variables))
    module.weights = jax.tree.leaves(weights)

    def serve(images: Any) -> Any:
        return converted(weights, images)

    module.serve = tf.function(serve, input_signature=[images], autograph=False)
    path = folder / FOLDER
    with reports_write_errors(path):
        tf.saved_model.save(module, str(path), signatures=module.serve)
    try:
        program = tf.saved_model.load(str(path)).signatures["serving_default"]
        program(images=tf.zeros([1, side, side, 3], tf.uint8))
    except tf.errors.InvalidArgumentError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise UserError(
            f"TensorFlow {tf.__version__} does not run this network: it is older than an operation "
            "of this JAX; choose --format=stablehlo or onnx."
        ) from error
    return path
