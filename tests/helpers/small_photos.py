# SPDX-License-Identifier: Apache-2.0
"""Small data sets of generated photographs, written by TFDS's own builders."""

import functools
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from balpoe_jax.data.images import decoding


@functools.cache
def jpeg(seed: int) -> bytes:
    """A photograph of blurred noise, whose size is random, too."""
    random = np.random.default_rng(seed)
    height, width = random.integers(40, 80, 2)
    coarse = random.integers(0, 256, (5, 5, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def prepare(
    name: str,
    data_dir: Path,
    splits: Mapping[str, np.ndarray],
    file_format: str = "tfrecord",
) -> None:
    """Writes a data set; `splits` has the number of images of each class of each split.

    The image of example `number` of class `label` is `jpeg(label % 50 + 50 * number)`.
    """
    builder = tfds.builder(name, data_dir=str(data_dir), file_format=file_format)

    def examples(split: str) -> Iterator[tuple[str, dict]]:
        for label, count in enumerate(splits[split]):
            for number in range(count):
                key = f"{split}_{label}_{number}"
                example = {"image": io.BytesIO(jpeg(label % 50 + 50 * number)), "label": label}
                if name == "imagenet_lt":
                    example["file_name"] = f"{key}.JPEG"
                else:
                    example |= {"id": key, "supercategory": label % 3}
                yield key, example

    builder._split_generators = lambda manager: {split: examples(split) for split in splits}
    builder.download_and_prepare()


def decode_windows(
    encoded: tf.Tensor, windows: tf.Tensor, flips: tf.Tensor, size: int
) -> tf.Tensor:
    """`decode_window` of a batch: strings, int32 `[b, 4]`, bool -> packed `[b, size, size]`."""
    return tf.map_fn(
        lambda example: decoding.decode_window(*example, size),
        (encoded, windows, flips),
        fn_output_signature=tf.TensorSpec([size, size], tf.uint32),
    )
