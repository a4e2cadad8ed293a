# SPDX-License-Identifier: Apache-2.0
"""Batches of image files are those of the same images in records and in memory."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from balpoe_jax.data.pipeline import eval_batches, train_batches
from balpoe_jax.data.records import tfrecords
from balpoe_jax.data.records.sources import (
    FileIndex,
    FileSource,
    RecordSource,
    SmallSource,
    StoredSource,
)
from balpoe_jax.data.settings import AugmentSettings, MixSettings, TrainSettings
from balpoe_jax.errors import UserError
from tests.helpers.small_photos import jpeg

NUMBER = 13
LABELS = np.arange(NUMBER) % 3
NORMALISATION = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def settings(**changes) -> TrainSettings:
    values = {
        "batch_size": 4, "seed": 3, "mean": NORMALISATION[0], "std": NORMALISATION[1],
        "augment": AugmentSettings(flip=True), "mix": MixSettings(alpha=0.4),
    }  # fmt: skip
    return TrainSettings(**{**values, **changes})


def in_records(folder: Path) -> RecordSource:
    path = str(folder / "photos.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for i, label in enumerate(LABELS):
            feature = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg(i)])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())
    return RecordSource(tfrecords.scan([path], ""), 16, 18, paths=(path,))


def in_files(folder: Path, contents: list[bytes], small: bool = False) -> StoredSource:
    names = [f"{label}/{i}.jpg" for i, label in enumerate(LABELS)]
    for name, content in zip(names, contents, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    index = FileIndex(np.array(names), LABELS)
    if small:
        return SmallSource.reading(FileSource(index, 8, 8, root=str(folder)))
    return FileSource(index, 16, 18, root=str(folder))


def assert_equal(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, list(one), list(other))


@pytest.mark.integration
def test_photographs_in_files_make_the_batches_of_those_in_records(tmp_path: Path) -> None:
    files = in_files(tmp_path / "files", [jpeg(i) for i in range(NUMBER)])
    records = in_records(tmp_path)
    made, expected = (train_batches(s, settings(), 2, 5) for s in (files, records))
    assert_equal(made, expected)
    assert_equal(*(eval_batches(s, 5, *NORMALISATION) for s in (files, records)))


def small_pngs() -> list[bytes]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (NUMBER, 8, 8, 3)).astype(np.uint8)
    return [tf.io.encode_png(image).numpy() for image in images]


@pytest.mark.integration
def test_small_images_in_files_make_the_batches_of_those_in_memory(tmp_path: Path) -> None:
    files = in_files(tmp_path, small_pngs(), small=True)
    memory = files.load()
    augment = AugmentSettings(crop_padding=1, flip=True)
    made, expected = (train_batches(s, settings(augment=augment), 2, 5) for s in (files, memory))
    assert_equal(made, expected)
    assert_equal(*(eval_batches(s, 5, *NORMALISATION) for s in (files, memory)))


@pytest.mark.integration
def test_a_photograph_that_is_turned_by_exif_is_seen_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255  # left half, which is the top once the image is turned clockwise
    path = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    source = in_files(tmp_path, [path.read_bytes()] * NUMBER)
    batch = next(iter(eval_batches(source, 1, (0.0,) * 3, (1.0,) * 3)))
    assert batch.images[0, :6].min() > 0.9 and batch.images[0, -6:].max() < 0.1


@pytest.mark.integration
@pytest.mark.parametrize("small", [False, True])
def test_a_file_that_is_damaged_by_now_is_named(tmp_path: Path, small: bool) -> None:
    source = in_files(tmp_path, small_pngs(), small)
    Path(source.file(5)).write_bytes(small_pngs()[5][:60])
    message = r"test or held-out image 2/5.jpg \(example 5, .*; replace or remove the file"
    with pytest.raises(UserError, match=message):
        list(eval_batches(source, 4, *NORMALISATION))
    message = r"training image 2/5.jpg .*; replace or remove the file; or train without it"
    with pytest.raises(UserError, match=message):
        list(train_batches(source, settings(augment=AugmentSettings()), 0, 4))
