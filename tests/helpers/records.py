# SPDX-License-Identifier: Apache-2.0
"""Writes TFRecord files."""

from pathlib import Path

import tensorflow as tf


def feature(value: bytes | int | list[float]) -> tf.train.Feature:
    """A feature that holds a value."""
    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    if isinstance(value, int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Feature(float_list=tf.train.FloatList(value=value))


def write(path: Path, examples: list[dict]) -> str:
    """Writes examples to a file; returns its path."""
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            features = {name: feature(value) for name, value in example.items()}
            serialized = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(serialized.SerializeToString())
    return str(path)
