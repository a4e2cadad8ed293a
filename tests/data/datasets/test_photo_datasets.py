# SPDX-License-Identifier: Apache-2.0
"""ImageNet-LT and iNaturalist 2018 as the stock builders write them, small and generated."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data import datasets, pipeline
from balpoe_jax.data.batches.mixing import Mixer
from balpoe_jax.data.datasets import photos
from balpoe_jax.data.images import decoding, packed_ops
from balpoe_jax.data.images.augment import augment_batch, normalize
from balpoe_jax.data.images.views import EitherView, View
from balpoe_jax.data.pipeline import eval_batches, train_batches
from balpoe_jax.data.randomness import RowRandom, stream_seed
from balpoe_jax.data.records import sources
from balpoe_jax.data.records.readers import make_reader
from balpoe_jax.data.settings import AugmentSettings, Host, MixSettings, TrainSettings
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from tests.helpers.small_photos import decode_windows, jpeg, prepare

SIZE, RESIZE = 16, 18
TRAIN = np.array([5, 3, 2] + [1] * 997)
TEST = np.array([1, 2, 3, 4] + [0] * 996)
JITTERED = AugmentSettings(flip=True, color_jitter=(0.4, 0.4, 0.4))
LONG = dataclasses.replace(JITTERED, policy="randaugment")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    validation = np.full(1000, 1)
    validation[:3] = 4
    prepare("imagenet_lt", folder, {"train": TRAIN, "validation": validation, "test": TEST})
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def load(data_dir: Path, **changes):
    options = {"verify_counts": False, "image_size": SIZE, "resize": RESIZE, **changes}
    return datasets.load("imagenet_lt", 256.0, str(data_dir), **options)


def test_the_splits_and_their_counts(data_dir: Path) -> None:
    data = load(data_dir, held_out_per_class=2)
    np.testing.assert_array_equal(data.class_counts, TRAIN)
    np.testing.assert_array_equal(np.bincount(data.test.labels, minlength=1000), TEST)
    assert not data.counts_as_published
    assert data.train.image_shape == (SIZE, SIZE, 3)
    assert sorted(data.test_names)[:2] == ["test_0_0.JPEG", "test_1_0.JPEG"]
    counts = np.bincount(data.held_out.labels, minlength=1000)
    assert counts[:3].tolist() == [2, 2, 2] and (counts[3:] == 1).all()
    assert data.held_out_description == "1,003 images of the validation split, up to 2 a class"
    assert load(data_dir).held_out is None


def test_counts_that_are_not_the_published_ones_are_refused(data_dir: Path) -> None:
    with pytest.raises(UserError, match="should have 115846 training images, 1280 to 5 a class"):
        load(data_dir, verify_counts=True)


def test_published_counts_are_accepted(tmp_path: Path, monkeypatch) -> None:
    test = np.ones(1000, int)
    prepare("imagenet_lt", tmp_path, {"train": TRAIN, "validation": test, "test": test})
    published = photos.PhotoDataset(1000, int(TRAIN.sum()), 5, 1, 1000, "test", "", "file_name")
    monkeypatch.setitem(photos.PHOTO_DATASETS, "imagenet_lt", published)
    assert load(tmp_path, verify_counts=True).counts_as_published
    for change in ({"num_train": 9}, {"largest": 6}, {"smallest": 2}, {"num_test": 2000}):
        monkeypatch.setitem(
            photos.PHOTO_DATASETS, "imagenet_lt", dataclasses.replace(published, **change)
        )
        with pytest.raises(UserError, match="imagenet_lt should have"):
            load(tmp_path, verify_counts=True)


def test_a_class_without_training_images_is_refused(tmp_path: Path) -> None:
    empty = TRAIN.copy()
    empty[7] = 0
    prepare("imagenet_lt", tmp_path, {"train": empty, "validation": TRAIN, "test": TEST})
    with pytest.raises(UserError, match=r"Class 7 of the imagenet_lt in .* has no training image"):
        load(tmp_path)


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    prepare("imagenet_lt", tmp_path, {"train": TRAIN})
    with pytest.raises(UserError, match="has no test split but train"):
        load(tmp_path)


def test_an_image_size_is_needed(data_dir: Path) -> None:
    with pytest.raises(UserError, match="image size of at least 1"):
        load(data_dir, image_size=0)


@pytest.mark.integration
def test_every_test_photograph_is_read_once_and_cropped_in_the_centre(data_dir: Path) -> None:
    data = load(data_dir)
    batches = list(eval_batches(data.test, 4, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    masks = np.concatenate([batch.mask for batch in batches])
    assert masks.tolist() == [True] * 10 + [False] * 2
    images = np.concatenate([batch.images for batch in batches])[masks]
    labels = np.concatenate([batch.labels for batch in batches])[masks]
    np.testing.assert_array_equal(labels, data.test.labels)
    for image, name in zip(images, data.test_names, strict=True):
        label, number = map(int, name.removesuffix(".JPEG").split("_")[1:])
        encoded = tf.constant(jpeg(label % 50 + 50 * number))
        expected = decoding.decode_central(encoded, RESIZE, SIZE).numpy() / 255
        expected = (expected - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
        np.testing.assert_allclose(image, expected, atol=1e-5)


@pytest.mark.integration
def test_reading_again_opens_no_file_again(data_dir: Path) -> None:
    data = load(data_dir)
    opened = []
    for _ in range(3):
        list(eval_batches(data.test, 4, (0.5,) * 3, (0.25,) * 3))
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[2] == opened[1]


def test_a_limit_of_open_files_that_is_too_low_is_one_sentence(data_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources.resource, "getrlimit", lambda _: (64, 100))
    with pytest.raises(UserError, match=r"needs \d+ open files, but this machine allows 100"):
        make_reader(load(data_dir).test)


def test_the_soft_limit_of_open_files_is_raised(data_dir: Path, monkeypatch) -> None:
    limits = []
    monkeypatch.setattr(sources.resource, "getrlimit", lambda _: (64, 4096))
    monkeypatch.setattr(sources.resource, "setrlimit", lambda _, limit: limits.append(limit))
    make_reader(load(data_dir).test)
    ((soft, hard),) = limits
    assert 500 < soft < hard == 4096


def settings(**changes) -> TrainSettings:
    fields = {"batch_size": 8, "seed": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    fields |= {"augment": JITTERED, "mix": MixSettings(alpha=0.3)}
    return TrainSettings(**{**fields, **changes})


def collect(data_dir: Path, first: int, last: int, host: Host = Host()) -> list[TrainBatch]:  # noqa: B008
    return list(train_batches(load(data_dir).train, settings(), first, last, host))


def assert_equal(left: list[TrainBatch], right: list[TrainBatch]) -> None:
    for a, b in zip(left, right, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.integration
def test_training_batches_are_a_function_of_the_step(data_dir: Path) -> None:
    batches = collect(data_dir, 0, 5)
    assert batches[0].images.shape == (8, SIZE, SIZE, 3)
    assert_equal(collect(data_dir, 3, 5, Host(threads=1)), batches[3:])
    assert np.abs(batches[0].images - batches[1].images).mean() > 0.1


@pytest.mark.integration
@pytest.mark.slow_cases("augment1", "augment0")
@pytest.mark.parametrize("augment", [LONG, dataclasses.replace(JITTERED, rotation=30.0)])
def test_a_training_batch_is_what_its_stages_make(data_dir: Path, augment: AugmentSettings) -> None:
    """Done here by batch and on bytes: a rotation comes before the changes of colour."""
    source, options = load(data_dir).train, settings(augment=augment)
    batch = list(train_batches(source, options, 0, 3))[2]
    indices = pipeline.batch_indices(source.labels, options, 2)
    encoded, labels = make_reader(source).read(tf.constant(indices))
    np.testing.assert_array_equal(batch.labels, labels)
    random = RowRandom(
        stream_seed(options.seed, "augment", tf.constant(2, tf.int64)), 8, slice(0, 8)
    )
    windows = decoding.random_windows(decoding.shapes(encoded), random.stream("window"))
    flips = random.stream("move").uniform("flip") < 0.5
    images = packed_ops.unpack(decode_windows(encoded, windows, flips, SIZE))
    images = augment_batch(images, random, dataclasses.replace(augment, flip=False))
    images = normalize(images, options.mean, options.std).numpy()
    weight = batch.mix_weight[:, None, None, None]
    assert 0 < weight[0] < 1
    mixer = Mixer(options.mix, source.labels, source.image_shape, 8, options.seed, slice(0, 8))
    partners = mixer.draw(tf.constant(2, tf.int64), labels)[0].partners.numpy()
    np.testing.assert_array_equal(batch.other_labels, labels.numpy()[partners])
    expected = weight * images + (1 - weight) * images[partners]
    np.testing.assert_allclose(batch.images, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.integration
def test_hosts_make_the_parts_of_the_same_batches(data_dir: Path) -> None:
    """With mixup within each host's group, which is where hosts could differ from one."""
    options = settings(mix=MixSettings(alpha=0.3, groups=2))
    source = load(data_dir).train
    whole = list(train_batches(source, options, 0, 2))
    parts = [list(train_batches(source, options, 0, 2, Host(i, 2))) for i in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        together = jax.tree.map(lambda *x: np.concatenate(x), *halves)
        assert_equal([together], [batch])


@pytest.mark.integration
def test_an_epoch_has_every_photograph(data_dir: Path) -> None:
    source = load(data_dir).train
    options = settings(mix=MixSettings(), augment=AugmentSettings())
    steps = -(-len(source) // 8)
    labels = np.concatenate([b.labels for b in train_batches(source, options, 0, steps)])
    np.testing.assert_array_equal(np.bincount(labels[: len(source)], minlength=1000), TRAIN)


@pytest.mark.slow
def test_half_of_the_photographs_are_mirrored(data_dir: Path) -> None:
    source = load(data_dir).train
    pair = [
        np.concatenate(
            [
                batch.images
                for batch in train_batches(
                    source, settings(mix=MixSettings(), augment=AugmentSettings(flip=flip)), 0, 40
                )
            ]
        )
        for flip in (False, True)
    ]
    # Resizing mirrors the weights of pixels, not their rounding.
    kept = np.abs(pair[0] - pair[1]).max(axis=(1, 2, 3)) < 1e-6
    mirrored = np.abs(pair[0][:, :, ::-1] - pair[1]).max(axis=(1, 2, 3)) < 0.05
    assert (kept ^ mirrored).all()
    assert 0.4 < mirrored.mean() < 0.6


@pytest.mark.integration
def test_inaturalist_is_tested_on_its_validation_split(tmp_path: Path) -> None:
    train = np.ones(8142, int)
    train[0] = 3
    splits = {"train": train, "validation": train[:50], "test": np.ones(2, int)}
    prepare("i_naturalist2018", tmp_path, splits)
    data = datasets.load(
        "i_naturalist2018", 500.0, str(tmp_path), False, image_size=SIZE, resize=RESIZE
    )
    np.testing.assert_array_equal(data.class_counts, train)
    assert len(data.test) == 52
    assert data.held_out is None
    assert "validation_49_0" in data.test_names
    batch = next(eval_batches(data.test, 8, (0.5,) * 3, (0.25,) * 3))
    assert batch.images.shape == (8, SIZE, SIZE, 3)


VIEW = AugmentSettings(flip=True, crop_area=0.5)
CMO = MixSettings(alpha=1.0, rule="cmo", probability=0.5)


def view_of(source, encoded, options: TrainSettings, augment, stream: str, step: int) -> np.ndarray:
    """A view of photographs, by hand: the windows of a batch, decoded and normalised."""
    random = RowRandom(stream_seed(options.seed, stream, tf.constant(step)), 8, slice(0, 8))
    scale = (augment.crop_area or 0.08, 1.0)
    shapes = decoding.shapes(encoded)
    windows = decoding.random_windows(shapes, random.stream("window"), scale)
    flips = random.stream("move").uniform("flip") < 0.5
    images = packed_ops.unpack(decode_windows(encoded, windows, flips, SIZE))
    return normalize(images, options.mean, options.std).numpy()


@pytest.mark.slow
@pytest.mark.integration
def test_views_and_partners_of_the_sampler_have_windows_of_their_own(data_dir: Path) -> None:
    source = load(data_dir).train
    options = settings(augment=AugmentSettings(flip=True), views=(VIEW,), mix=CMO)
    batches = list(train_batches(source, options, 3, 7))
    mixer = Mixer(CMO, source.labels, source.image_shape, 8, options.seed, slice(0, 8))
    reader, mixed = make_reader(source), []
    for step, batch in enumerate(batches, 3):
        own, labels = reader.read(tf.constant(pipeline.batch_indices(source.labels, options, step)))
        np.testing.assert_array_equal(batch.labels, labels)
        second = view_of(source, own, options, VIEW, "augment_2", step)
        np.testing.assert_allclose(batch.views[1], second, atol=1e-5)
        expected = view_of(source, own, options, options.augment, "augment", step)
        mixed.append(bool(mixer.mixes(tf.constant(step, tf.int64))))
        if mixed[-1]:
            positions = mixer.partners_to_read(tf.constant(step, tf.int64))
            read, read_labels = reader.read(positions)
            np.testing.assert_array_equal(batch.other_labels, read_labels)
            others = view_of(source, read, options, options.augment, "augment_others", step)
            mix, _ = mixer.draw(tf.constant(step, tf.int64), labels, read_labels)
            expected = np.where(mix.share == 1, expected, others)
        np.testing.assert_allclose(batch.images, expected, atol=1e-5)
    assert any(mixed) and not all(mixed)


def test_each_photograph_is_made_in_one_of_two_ways(data_dir: Path) -> None:
    """Decoded, and what is left to do with the whole batch, in the same way of the two."""
    source = load(data_dir).train
    either = EitherView(source, VIEW, AugmentSettings(cutout=8))
    ways = View(source, VIEW), View(source, AugmentSettings(cutout=8))
    encoded, _ = make_reader(source).read(tf.range(8))
    random = RowRandom(stream_seed(1, "either", tf.constant(3, tf.int64)), 8, slice(0, 8))

    def make(view, random: RowRandom) -> np.ndarray:
        drawn = view.draw(decoding.shapes(encoded), random)
        rows = [
            view.decode(x, tf.nest.map_structure(lambda y, i=i: y[i], drawn))
            for i, x in enumerate(encoded)
        ]
        return packed_ops.unpack(view.augment(tf.stack(rows), random)).numpy()

    found = make(either, random)
    first, second = make(ways[0], random), make(ways[1], random.stream("second"))
    as_first, as_second = ((found == x).all(axis=(1, 2, 3)) for x in (first, second))
    assert (as_first ^ as_second).all() and 0 < as_second.sum() < 8


@pytest.mark.slow
def test_views_for_evaluation_have_windows_by_position(data_dir: Path) -> None:
    source = load(data_dir).test
    statistics = (0.5,) * 3, (0.25,) * 3
    jittered = dataclasses.replace(VIEW, color_jitter=(0.4, 0.4, 0.4))
    by_size = []
    for batch_size in (4, 10):
        made = list(pipeline.view_batches(source, batch_size, *statistics, jittered, 3, 1))
        by_size.append(np.concatenate([batch.images[batch.mask] for batch in made]))
        labels = np.concatenate([batch.labels[batch.mask] for batch in made])
        np.testing.assert_array_equal(labels, source.labels)
    np.testing.assert_array_equal(*by_size)
    central = next(eval_batches(source, 10, *statistics)).images
    assert (np.abs(by_size[0] - central).mean(axis=(1, 2, 3)) > 0.01).all()
