# SPDX-License-Identifier: Apache-2.0
"""Packages that only some data sets need: the extra `balpoe-jax[tfds]`."""

import contextlib
import importlib.util

from balpoe_jax.errors import UserError

INSTALL = 'pip install "balpoe-jax[tfds]"'


def has_tensorflow() -> bool:
    """Whether TensorFlow is installed; it is not imported."""
    return _is_installed("tensorflow")


def has_tfds() -> bool:
    """Whether TFDS and TensorFlow, which reads for it, are installed; neither is imported."""
    return has_tensorflow() and _is_installed("tensorflow_datasets")


def require_tensorflow(purpose: str) -> None:
    """Raises an error without TensorFlow; otherwise hides the GPUs from it.

    TensorFlow only feeds the training: the GPUs and their memory belong to JAX.

    Args:
        purpose: Subject of the error message, such as "Reading photographs".

    Raises:
        UserError (a `ValueError`): TensorFlow is not installed.
    """
    if not has_tensorflow():
        raise UserError(f"{purpose} needs TensorFlow, which is not installed; {INSTALL}.")
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # TensorFlow has already started
        tf.config.set_visible_devices([], "GPU")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a package that is hidden, or half installed
        return False
