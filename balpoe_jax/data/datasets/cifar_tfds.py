# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 as TFDS has prepared them."""

from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from balpoe_jax.data.batches import unreadable
from balpoe_jax.data.datasets.tfds_folder import prepared_builder
from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.data.tracing import no_autograph
from balpoe_jax.errors import UserError


def read(name: str, data_dir: str, alternative: str = "") -> tuple[ArraySource, ArraySource]:
    """The training and the test images, in the archive's order; keys are positions in it.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: TFDS folder; empty for TFDS's own, into which an absent data set is downloaded.
        alternative: Another source of the same images, to be named in the error message.

    Raises:
        UserError (a `ValueError`): a data set that is not there or cannot be read.
    """
    builder = prepared_builder(name, data_dir, alternative)
    return _read_split(builder, "train"), _read_split(builder, "test")


def _read_split(builder: Any, split: str) -> ArraySource:
    """A whole split in memory, in the order of the original archive.

    TFDS shuffles its records. The published selection depends on the original positions, which an
    `id` such as "train_00042" tells.
    """
    records = _records(builder, split)
    decoded = records.map(
        no_autograph(
            lambda record: {
                "id": record["id"],
                "label": record["label"],
                "image": tf.io.decode_image(record["image"], channels=3, expand_animations=False),
            }
        ),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    try:
        batches = list(decoded.batch(1024).as_numpy_iterator())
    except tf.errors.OpError as error:
        raise UserError(
            f"The {split} records in {builder.data_dir} cannot be read "
            f"({_first_unreadable(records) or unreadable.explain(error)}); remove that folder and "
            "prepare the data set again."
        ) from error
    if not batches:
        raise UserError(f"The {split} split in {builder.data_dir} is empty; prepare it again.")
    columns = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    keys = np.array([int(name.rsplit(b"_", 1)[-1]) for name in columns["id"]], np.int64)
    order = np.argsort(keys, kind="stable")
    source = ArraySource(columns["image"], columns["label"].astype(np.int64), keys)
    return source.select(order)


def _records(builder: Any, split: str) -> tf.data.Dataset:
    """The features of every record, with the image as it is stored."""
    encoded = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value != "array_record":
        return builder.as_dataset(split=split, shuffle_files=False, decoders=encoded)
    # TFDS reads ArrayRecord by position only; CIFAR is small enough to be held in memory.
    source = builder.as_data_source(split=split, decoders=encoded)
    try:
        rows = [source[i] for i in range(len(source))]
    except (RuntimeError, ValueError) as error:  # of the library that reads the files
        raise UserError(
            f"The {split} records in {builder.data_dir} cannot be read "
            f"({unreadable.explain(error)}); remove that folder and prepare the data set again."
        ) from error
    return tf.data.Dataset.from_tensor_slices(
        {key: [row[key] for row in rows] for key in ("id", "label", "image")}
    )


def _first_unreadable(records: tf.data.Dataset) -> str | None:
    """The first record that cannot be read or decoded, and why."""
    number = 0
    try:
        for record in records:
            number += 1
            try:
                tf.io.decode_image(record["image"], channels=3)
            except tf.errors.OpError as error:
                return f"image {record['id'].numpy().decode()}: {unreadable.explain(error)}"
    except tf.errors.OpError as error:
        return f"record {number} of the split: {unreadable.explain(error)}"
    return None
