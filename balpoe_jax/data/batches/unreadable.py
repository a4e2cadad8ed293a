# SPDX-License-Identifier: Apache-2.0
"""Finds the photographs of a batch that cannot be read or decoded.

The pipeline examines nothing. When a batch fails, its images are read again one by one.
"""

import re
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from balpoe_jax.data.batches.replacements import BadImage
from balpoe_jax.data.images import decoding
from balpoe_jax.data.records.sources import (
    UNREADABLE,
    ForgivingSource,
    SmallSource,
    Source,
    StoredSource,
)
from balpoe_jax.errors import TransientError, UserError, is_transient


def examine(source: StoredSource, index: int, step: int = 0) -> BadImage | None:
    """Reads and decodes the whole of an image; None if nothing is wrong with it.

    Raises:
        UserError (a `ValueError`): a file that cannot be read at all; a `TransientError` if a later
            try may succeed.
    """
    try:
        if isinstance(source, SmallSource):
            source.read_pixels(index)
            return None
        encoded = tf.constant(source.read_image(index))
        whole = tf.concat([[0, 0], decoding.image_shape(encoded)], axis=0)
        decoding.decode_window(encoded, whole, tf.constant(False), source.image_shape[0])
    except OSError as error:
        raise (TransientError if is_transient(error) else UserError)(
            f"The file {source.file(index)} cannot be read ({error.strerror or error}); start "
            "again when it is there."
        ) from error
    except (*UNREADABLE, tf.errors.OpError) as error:
        (name,) = source.ids(np.array([index]))
        return BadImage(step, index, name, source.where(index), explain(error))
    return None


def explain(error: Exception) -> str:
    """The first line of an error of TensorFlow's, without its place in the graph."""
    message = error.message if isinstance(error, tf.errors.OpError) else str(error)
    # What is in double braces, and in later lines, is about the graph.
    first = re.sub(r"\{\{.*?\}\}", "", message).strip().split("\n")[0]
    return re.sub(r"\s*\[Op:\w+\].*", "", first)[:300].rstrip(".")


def forgive(source: ForgivingSource, indices: Iterable[int]) -> bool:
    """Finds the images that cannot be decoded, which are blank from then on.

    Args:
        source: Source of the images, which records them.
        indices: Positions in the source.

    Returns:
        Whether there is one.
    """
    found = [bad for bad in (examine(source, int(i)) for i in indices) if bad]
    source.bad.update({bad.index: bad.reason for bad in found})
    return bool(found)


def refuse(source: Source, indices: Iterable[int], part: str, remedy: str) -> None:
    """Raises UserError with the first of some images that cannot be used, if there is one.

    Args:
        source: Source of the images; those in memory can all be used.
        indices: Positions in the source.
        part: Name of the source, such as "training".
        remedy: End of the message, with another remedy than replacing the image, if any.
    """
    if not isinstance(source, StoredSource):
        return
    for index in indices:
        bad = examine(source, int(index))
        if bad:
            raise UserError(f"The {part} image {bad}; {source.remedy()}{remedy}.")
