# SPDX-License-Identifier: Apache-2.0
"""Data sets that TFDS has prepared on disk."""

import logging
from typing import Any

from balpoe_jax.data import extras
from balpoe_jax.errors import UserError

log = logging.getLogger(__name__)


def prepared_builder(name: str, data_dir: str, alternative: str = "") -> Any:
    """The TFDS builder of a prepared data set; downloads only into TFDS's own folder.

    Args:
        name: Name of the data set in TFDS.
        data_dir: TFDS folder that must hold it; empty for TFDS's own, into which it is downloaded.
        alternative: Another source of the same images, to be named in the error message.

    Raises:
        UserError (a `ValueError`): a data set that is not there and cannot be downloaded; TFDS or
            TensorFlow is not installed.
    """
    extras.require_tensorflow(f"Reading {name} through TFDS")
    if not extras.has_tfds():
        raise UserError(f"{name} is read through TFDS, which is not installed; {extras.INSTALL}.")
    import tensorflow_datasets as tfds

    where = f" --data_dir={data_dir}" if data_dir else ""
    holds = f"it, or {alternative}," if alternative else "it"
    remedy = (
        f"prepare it with `tfds build {name}{where}`, or name the folder that holds {holds} with "
        "--config.data.data_dir=DIR."
    )
    builder = tfds.builder(name, data_dir=data_dir or None)
    if builder.info.splits:
        return builder
    if data_dir:
        raise UserError(f"The data set {name} is not in {data_dir}; {remedy}")
    log.info("Downloading %s into %s", name, builder.data_dir)
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever the network and the archive libraries raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"The data set {name} is not in {builder.data_dir} and could not be downloaded "
            f"({reason}); {remedy}"
        ) from error
    return builder
