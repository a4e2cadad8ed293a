# SPDX-License-Identifier: Apache-2.0
"""RandAugment: its operations against Pillow, from `fixtures/make_pil_fixtures.py`, its draws."""

import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data.images import packed_ops, randaugment
from balpoe_jax.data.images.augment import augment_batch
from balpoe_jax.data.images.randaugment import Draw
from balpoe_jax.data.randomness import RowRandom
from balpoe_jax.data.settings import IMAGENET_MEAN, AugmentSettings
from tests.helpers.pillow import EXACT, GEOMETRIC
from tests.helpers.pillow import image_fixtures as fixtures


def source(batch_size: int, seed: int = 0) -> RowRandom:
    return RowRandom(tf.constant([seed, 1]), batch_size, slice(0, batch_size))


def drawn(magnitude: float, sign: float, cubic: float) -> Draw:
    level = tf.constant(magnitude / 10, tf.float32)
    return Draw(tf.constant(0), level, tf.constant(sign, tf.float32), tf.constant(bool(cubic)))


@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize("name", [*EXACT, *GEOMETRIC])
def test_operations_are_those_of_pillow(name: str, shape: str) -> None:
    """Geometric ones may be off by one level: Pillow computes them in float64.

    At whole magnitudes many exact results are whole numbers, which truncate either way.
    """
    images = fixtures()[f"images/{shape}"][[0, -1]]
    operation = randaugment._operations(IMAGENET_MEAN)[name]
    for values, expected in zip(
        fixtures()["values/randaugment"], fixtures()[f"randaugment/{name}/{shape}"], strict=True
    ):
        packed = [
            operation(packed_ops.pack(tf.constant(image)), drawn(*values)) for image in images
        ]
        actual = np.stack([packed_ops.unpack(image).numpy() for image in packed])
        error = np.abs(actual.astype(int) - expected)
        assert error.max() <= (1 if name in GEOMETRIC else 0), values
        assert (error > 0).mean() < (0.06 if values[0] == 10 else 0.005), values


def test_every_operation_is_there_once() -> None:
    names = set(randaugment._operations(IMAGENET_MEAN))
    assert names == {*EXACT, *GEOMETRIC} and len(names) == 15


@pytest.mark.integration
def test_geometric_operations_show_the_fill_outside() -> None:
    image = tf.zeros([20, 20], tf.uint32)
    operations = randaugment._operations((7, 8, 9))
    for name in GEOMETRIC:
        output = packed_ops.unpack(operations[name](image, drawn(10, 1, 0))).numpy().reshape(-1, 3)
        colours = {tuple(int(value) for value in pixel) for pixel in output}
        assert colours == {(0, 0, 0), (7, 8, 9)}, name


def test_draws() -> None:
    draws = 40_000
    which, level, sign, cubic = (x.numpy() for x in randaugment.draw(source(draws)))
    counts = np.bincount(which.ravel(), minlength=16) / which.size
    expected = np.array([0.5] + [0.5 / 15] * 15)
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected / which.size)).all()
    # With replacement and independently: the same operation twice as often as chance has it.
    twice = (which[:, 0] == which[:, 1]) & (which[:, 0] > 0)
    assert abs(twice.mean() - 1 / 60) < 4 * np.sqrt(1 / 60 / draws)
    for hits in (sign > 0, cubic, level == 1):
        assert abs(hits.mean() - 0.5) < 4 * 0.5 / np.sqrt(hits.size)
    # Half a normal distribution lies below its mean, by 0.5 * sqrt(2 / pi) on average.
    below = 10 * (1 - level[level < 1])
    assert abs(below.mean() - 0.5 * np.sqrt(2 / np.pi)) < 4 * 0.3 / np.sqrt(below.size)
    assert set(np.unique(sign)) == {-1.0, 1.0}


@pytest.mark.slow
@pytest.mark.integration
def test_number_and_strength_of_the_operations_may_be_others() -> None:
    draws = 20_000
    which, level, *_ = (x.numpy() for x in randaugment.draw(source(draws), 3, 4.0))
    assert which.shape == level.shape == (draws, 3)
    runs = (which > 0).mean(axis=0)
    assert (np.abs(runs - 0.5) < 4 * 0.5 / np.sqrt(draws)).all()
    assert abs(10 * level.mean() - 4) < 4 * 0.5 / np.sqrt(level.size)
    assert abs(10 * level.std() - 0.5) < 0.02
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)), tf.uint8)
    settings = AugmentSettings(
        policy="randaugment", randaugment_layers=3, randaugment_magnitude=4.0, fill=(1, 2, 3)
    )
    augmented = augment_batch(images, source(4), settings)
    drawn = randaugment.draw(source(4).stream("policy"), 3, 4.0)
    for i, image in enumerate(images):
        row = randaugment.Draw(*(x[i] for x in drawn))
        one = randaugment.apply(packed_ops.pack(image), row, (1, 2, 3))
        np.testing.assert_array_equal(augmented[i], packed_ops.unpack(one))
    rest, only = settings.split_per_image_ops()
    assert (rest.policy, only) == ("none", settings)


def test_only_the_drawn_operations_run(monkeypatch) -> None:
    """Each operation adds its own power of two, so that a pixel tells which ran, and how often."""
    batch = 400
    names = list(randaugment._operations(IMAGENET_MEAN))[:3]
    runs = tf.Variable([0, 0, 0])

    def counting(i: int):
        def operation(image: tf.Tensor, draw: Draw) -> tf.Tensor:
            runs.scatter_nd_add([[i]], [1])
            return image + tf.constant(4**i, tf.uint32)

        return operation

    operations = {name: counting(i) for i, name in enumerate(names)}
    monkeypatch.setattr(randaugment, "_operations", lambda fill: operations)
    draws = randaugment.draw(source(batch))
    apply = tf.function(lambda row: randaugment.apply(tf.zeros([2, 2], tf.uint32), row))
    rows = [Draw(*(x[i] for x in draws)) for i in range(batch)]
    output = [apply(row).numpy()[0, 0] for row in rows]
    expected = np.array([[(row == i).sum() for i in (1, 2, 3)] for row in draws.which.numpy()])
    np.testing.assert_array_equal(output, expected @ [1, 4, 16])
    np.testing.assert_array_equal(runs.numpy(), expected.sum(axis=0))


@pytest.mark.slow
def test_threads_change_nothing() -> None:
    images = np.random.default_rng(0).integers(0, 256, (16, 24, 24, 3)).astype(np.uint8)

    def augment(step: tf.Tensor) -> tf.Tensor:
        random = RowRandom(tf.stack([3, tf.cast(step, tf.int32)]), 16, slice(0, 16))
        return augment_batch(tf.constant(images), random, AugmentSettings(policy="randaugment"))

    def batches(threads: int) -> list[np.ndarray]:
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        dataset = tf.data.Dataset.range(4).map(augment, threads).with_options(options)
        return list(dataset.as_numpy_iterator())

    for left, right in zip(batches(1), batches(4), strict=True):
        np.testing.assert_array_equal(left, right)
