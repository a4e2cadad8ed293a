# SPDX-License-Identifier: Apache-2.0
"""Data sets: what is kept, in which order, and which ones are refused. CIFAR is generated here."""

import logging
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from balpoe_jax.config import resolve
from balpoe_jax.data import datasets, long_tail
from balpoe_jax.data.datasets import balanced, cifar_tfds
from balpoe_jax.data.datasets.held_out import held_out_counts, hold_out_of_training
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.build import build
from tests.helpers.config_files import get_config

PER_CLASS = {"train": 500, "test": 100}
FEW_PER_CLASS = {"train": 40, "test": 10}


class Builder:
    """A prepared CIFAR-100 as TFDS gives it: PNG files, in an order that is not the archive's.

    The image at a position of the archive has that position in its pixels.
    """

    info = SimpleNamespace(file_format=SimpleNamespace(value="tfrecord"))

    def __init__(self, per_class: dict[str, int], top_label: int = 99) -> None:
        self.labels = {}
        for split, count in per_class.items():
            labels = np.random.default_rng(3).permutation(np.repeat(np.arange(100), count))
            self.labels[split] = np.minimum(labels, top_label)

    def as_dataset(self, split: str, shuffle_files: bool, decoders: dict) -> tf.data.Dataset:
        labels = self.labels[split]
        order = np.random.default_rng(4).permutation(len(labels))
        ids = [f"{split}_{position:05d}" for position in order]
        dataset = tf.data.Dataset.from_tensor_slices((ids, labels[order], order.astype(np.int32)))

        def record(name: tf.Tensor, label: tf.Tensor, position: tf.Tensor) -> dict[str, tf.Tensor]:
            pixel = tf.stack([position % 256, position // 256, tf.zeros_like(position)])
            image = tf.broadcast_to(tf.cast(pixel, tf.uint8), [2, 2, 3])
            return {"id": name, "label": label, "image": tf.io.encode_png(image)}

        return dataset.map(record)


def use(monkeypatch, builder: Builder) -> Builder:
    monkeypatch.setattr(cifar_tfds, "prepared_builder", lambda *_: builder)
    return builder


@pytest.mark.integration
def test_cifar_keeps_the_images_that_the_archives_order_selects(monkeypatch) -> None:
    builder = use(monkeypatch, Builder(PER_CLASS))
    data = datasets.load("cifar100", 100.0)
    labels = builder.labels["train"]
    counts = long_tail.exponential_counts(100, 500, 100)
    expected = long_tail.select_indices(labels, counts)
    pixels = data.train.images[:, 0, 0].astype(int)
    np.testing.assert_array_equal(pixels[:, 0] + 256 * pixels[:, 1], expected)
    np.testing.assert_array_equal(data.train.labels, labels[expected])
    np.testing.assert_array_equal(data.class_counts, counts)
    assert data.counts_as_published
    np.testing.assert_array_equal(data.test.labels, builder.labels["test"])


def test_held_out_images_are_neither_trained_on_nor_tested_on(monkeypatch) -> None:
    builder = use(monkeypatch, Builder(FEW_PER_CLASS))
    load = partial(datasets.load, "cifar100", 10.0, verify_counts=False)
    data = load(held_out_per_class=20)
    assert data.held_out is not None
    assert not set(data.held_out.keys) & set(data.train.keys)
    np.testing.assert_array_equal(data.held_out.labels, builder.labels["train"][data.held_out.keys])
    held_out = np.bincount(data.held_out.labels, minlength=100)
    np.testing.assert_array_equal(held_out, np.minimum(40 - data.class_counts, 20))
    assert held_out[0] == 0  # the largest class is kept whole
    assert f"{held_out.sum():,} training images" in data.held_out_description
    none = (held_out == 0).sum()
    assert f"{none} of 100 classes have none" in data.held_out_description
    np.testing.assert_array_equal(data.train.keys, load().train.keys)


def test_a_share_of_the_training_images_is_held_out_in_place_of_unused_ones() -> None:
    whole = datasets.load("digits", 26.0, held_out_per_class=20)
    data = hold_out_of_training(whole, 0.2)
    np.testing.assert_array_equal(whole.class_counts, [130, 90, 63, 43, 30, 21, 14, 10, 7, 5])
    np.testing.assert_array_equal(data.class_counts, [104, 72, 51, 35, 24, 17, 12, 8, 6, 4])
    assert data.held_out is not None and not data.counts_as_published
    for source, counts in (
        (data.train, data.class_counts),
        (data.held_out, whole.class_counts - data.class_counts),
    ):
        np.testing.assert_array_equal(np.bincount(source.labels), counts)
    assert sorted([*data.train.keys, *data.held_out.keys]) == sorted(whole.train.keys)
    assert "80 of the 413 training images, 20% of each class" in data.held_out_description
    assert data.test is whole.test


def test_of_a_class_at_least_one_image_is_held_out_but_never_the_last() -> None:
    counts = [1000, 10, 9, 2, 1, 0]
    np.testing.assert_array_equal(held_out_counts(counts, 0.1), [100, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(held_out_counts(counts, 0.9), [900, 9, 8, 1, 0, 0])


def test_a_balanced_set_holds_nothing_out() -> None:
    assert datasets.load("digits", 1.0, held_out_per_class=20).held_out is None
    assert datasets.load("digits", 26.0).held_out is None


def test_test_examples_have_names(monkeypatch) -> None:
    use(monkeypatch, Builder(FEW_PER_CLASS))
    names = datasets.load("cifar100", 10.0, verify_counts=False).test_names
    assert (names[0], names[-1], len(names)) == ("test_00000", "test_00999", 1000)


@pytest.mark.integration
def test_an_incomplete_set_is_refused_unless_told_otherwise(monkeypatch) -> None:
    use(monkeypatch, Builder(FEW_PER_CLASS))
    with pytest.raises(UserError, match=r"should have 500 training and 100 test .* has 40 to 40"):
        datasets.load("cifar100", 10.0)
    data = datasets.load("cifar100", 10.0, verify_counts=False)
    assert not data.counts_as_published
    np.testing.assert_array_equal(data.class_counts, long_tail.exponential_counts(100, 40, 10))


def test_unchecked_counts_are_announced_and_recorded(monkeypatch, caplog) -> None:
    use(monkeypatch, Builder(FEW_PER_CLASS))
    config = get_config("cifar100_lt", "ir=10,backbone=resnet8")
    config.data.verify_counts = False
    with caplog.at_level(logging.INFO, logger="balpoe_jax"):
        experiment = build(resolve(config))
    lines = [message for message in caplog.messages if "not checked" in message]
    assert lines == [
        "Class counts are not checked (data.verify_counts=False): they are not as published"
    ]
    recorded = experiment.data_record()
    assert (recorded["verify_counts"], recorded["counts_as_published"]) == (False, False)


def test_an_empty_class_is_refused(monkeypatch) -> None:
    use(monkeypatch, Builder({"train": 40, "test": 10}, top_label=98))
    with pytest.raises(UserError, match=r"Class 99 of cifar100 would have no training image"):
        datasets.load("cifar100", 10.0, verify_counts=False)


def test_a_label_out_of_range_is_refused(monkeypatch) -> None:
    builder = use(monkeypatch, Builder(FEW_PER_CLASS))
    builder.labels["train"][7] = 100
    with pytest.raises(UserError, match=r"Labels must lie in 0..99, but 1 do not"):
        datasets.load("cifar100", 10.0, verify_counts=False)


def test_digits_are_long_tailed_for_training_and_balanced_for_test() -> None:
    data = datasets.load("digits", 26.0)
    np.testing.assert_array_equal(data.class_counts, [130, 90, 63, 43, 30, 21, 14, 10, 7, 5])
    np.testing.assert_array_equal(np.bincount(data.test.labels), [40] * 10)
    assert not set(data.train.keys) & set(data.test.keys)
    assert data.train.image_shape == (8, 8, 3)
    assert data.train.images.max() == 255


@pytest.mark.parametrize("installed_as_usual", [True, False])
def test_digits_are_those_of_scikit_learn(monkeypatch, installed_as_usual: bool) -> None:
    if not installed_as_usual:
        monkeypatch.setattr(balanced.importlib.util, "find_spec", lambda name: None)
    expected = load_digits()
    values, labels = balanced._read_digits()
    np.testing.assert_array_equal(values, expected.images)
    np.testing.assert_array_equal(labels, expected.target)


def test_records_that_cannot_be_read_are_named(monkeypatch, tmp_path) -> None:
    builder = use(monkeypatch, Builder({"train": 1, "test": 1}))
    builder.data_dir = "prepared/cifar100"
    intact = builder.as_dataset

    def damaged(**options) -> tf.data.Dataset:
        def spoil(record: dict) -> dict:
            bad = record["id"] == b"train_00042"
            return {**record, "image": tf.where(bad, b"no image", record["image"])}

        return intact(**options).map(spoil)

    monkeypatch.setattr(builder, "as_dataset", damaged)
    expected = (
        r"train records in prepared/cifar100 cannot be read \(image train_00042: Unknown image"
    )
    with pytest.raises(UserError, match=expected):
        datasets.load("cifar100", 10.0)
    records = tmp_path / "records"
    with tf.io.TFRecordWriter(str(records)) as writer:
        for _ in range(3):
            writer.write(bytes(50))
    content = bytearray(records.read_bytes())
    content[100] ^= 1
    records.write_bytes(content)

    def unreadable(**_) -> tf.data.Dataset:
        image = tf.io.encode_png(tf.zeros([32, 32, 3], tf.uint8))
        return tf.data.TFRecordDataset(str(records)).map(
            lambda _: {"image": image, "id": "train_00001", "label": 0}
        )

    monkeypatch.setattr(builder, "as_dataset", unreadable)
    expected = r"cannot be read \(record 1 of the split: corrupted record at 78\)"
    with pytest.raises(UserError, match=expected):
        datasets.load("cifar100", 10.0)


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(UserError, match="choose from digits, cifar10, cifar100"):
        datasets.load("mnist", 10.0)
