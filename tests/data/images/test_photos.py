# SPDX-License-Identifier: Apache-2.0
"""Photographs against Pillow, from the fixtures of `fixtures/make_photo_fixtures.py`."""

import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data.images import decoding, packed_ops
from balpoe_jax.data.randomness import RowRandom
from tests.helpers.draws import windows_by_hand
from tests.helpers.pillow import photo_fixtures as fixtures
from tests.helpers.small_photos import decode_windows

FORMATS = (
    "jpeg_420", "jpeg_422", "jpeg_444", "jpeg_progressive", "jpeg_grey", "jpeg_cmyk",
    "png", "png_palette", "png_alpha",
)  # fmt: skip
NOT_RESIZED = 4  # so many of the windows have the size of the output
# Pillow 13 resizes the height first where it shrinks and the width grows; older ones never.
HEIGHT_FIRST = (8,)


def encoded(key: str) -> tf.Tensor:
    return tf.constant(fixtures()[f"encoded/{key}"].tobytes())


def difference(actual: tf.Tensor, expected: np.ndarray) -> np.ndarray:
    return np.abs(actual.numpy().astype(int) - expected)


def source(batch_size: int, seed: int = 0, rows: slice | None = None) -> RowRandom:
    return RowRandom(tf.constant([seed, 1]), batch_size, rows or slice(0, batch_size))


@pytest.mark.integration
@pytest.mark.parametrize("name", FORMATS)
def test_windows_are_decoded_and_resized_as_pillow_does(name: str) -> None:
    key = f"{name}_60x73"
    windows = fixtures()["windows"]
    decode = tf.function(
        lambda *image: packed_ops.unpack(decoding.decode_window(*image, 32)), reduce_retracing=True
    )
    # CMYK is converted to RGB in 8 bits, by rules that round differently.
    slack = 1 if name == "jpeg_cmyk" else 0
    for i, window in enumerate(windows):
        place = tf.constant(window, tf.int32)
        output = decode(encoded(key), place, tf.constant(False))
        error = difference(output, fixtures()[f"outputs/{key}"][i])
        if i < NOT_RESIZED:
            assert error.max() <= slack, window
        elif i in HEIGHT_FIRST or slack:
            assert error.max() <= 1 + slack and (error > 0).mean() < 0.5, window
        else:
            # Exact halves, common at simple ratios such as 5 / 4, may round either way.
            assert error.max() <= 1 and (error > 0).mean() < 0.04, window
        mirrored = decode(encoded(key), place, tf.constant(True))
        np.testing.assert_array_equal(mirrored, output[:, ::-1])


@pytest.mark.parametrize(
    "key",
    ["jpeg_420_60x73", "jpeg_420_81x64", "jpeg_420_33x90", "jpeg_420_120x150", "jpeg_420_40x53",
     "jpeg_grey_60x73", "png_60x73"],
)  # fmt: skip
def test_the_centre_is_what_resizing_all_and_cropping_gives(key: str) -> None:
    error = difference(decoding.decode_central(encoded(key), 40, 32), fixtures()[f"central/{key}"])
    assert error.max() <= (0 if key.endswith("40x53") else 1) and (error > 0).mean() < 0.02


def test_the_centre_of_a_large_image_is_cut_out_before_it_is_decoded(monkeypatch) -> None:
    asked = []
    real = tf.io.decode_and_crop_jpeg

    def noting(contents, crop_window, **options):
        asked.append(crop_window.numpy())
        return real(contents, crop_window, **options)

    monkeypatch.setattr(tf.io, "decode_and_crop_jpeg", noting)
    decoding.decode_central(encoded("jpeg_420_120x150"), 40, 16)
    (window,) = asked
    assert window[2] < 60 and window[3] < 60  # 48 of 120, and the reach of the filter


def test_shapes() -> None:
    keys = [f"{name}_60x73" for name in FORMATS] + ["jpeg_420_81x64"]
    found = decoding.shapes(tf.stack([encoded(key) for key in keys])).numpy()
    np.testing.assert_array_equal(found, [[60, 73]] * len(FORMATS) + [[81, 64]])


def test_windows_follow_the_rule_of_the_random_resized_crop() -> None:
    shapes = np.tile([[60, 73], [500, 375], [20, 900], [901, 20], [1, 1], [33, 48]], (400, 1))
    random = source(len(shapes))
    windows = decoding.random_windows(tf.constant(shapes, tf.int32), random).numpy()
    expected = windows_by_hand(
        shapes,
        random.uniform("area", 0.08, 1.0, tf.float64, (10,)).numpy(),
        random.uniform("ratio", np.log(3 / 4), np.log(4 / 3), tf.float64, (10,)).numpy(),
        random.uniform("position", 0, 1, tf.float64, (2,)).numpy(),
    )
    np.testing.assert_array_equal(windows, expected)
    # Of each kind there are some: central ones, and drawn ones at both ends.
    narrow = windows[2::6]
    assert (narrow == [0, 436, 20, 27]).all(axis=1).any()
    assert (windows[1::6, 0] == 0).any() and (windows.sum(axis=1) > 0).all()


def test_windows_have_the_distribution_of_the_random_resized_crop() -> None:
    """A share `a` of a square fits with probability min(1, log(1 / a) / log(4 / 3))."""
    shapes = tf.fill([20_000, 2], 1000)
    top, left, height, width = decoding.random_windows(shapes, source(20_000)).numpy().T
    assert (top >= 0).all() and (top + height <= 1000).all()
    assert (left >= 0).all() and (left + width <= 1000).all()
    ratio = np.log(width / height)
    assert abs(ratio.mean()) < 4 * 0.17 / np.sqrt(20_000)
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.01
    area = height * width / 1e6
    small = 0.32 / (0.67 + (0.25 + 0.75 * np.log(0.75)) / np.log(4 / 3))
    sigma = np.sqrt(small * (1 - small) / 20_000)
    assert area.min() > 0.079 and abs((area < 0.4).mean() - small) < 4 * sigma
    free = 1000 - height > 100
    share = top[free] / (1000 - height[free])
    assert abs(share.mean() - 0.5) < 4 * 0.289 / np.sqrt(free.sum())


def batches(threads: int, as_one: bool) -> list[np.ndarray]:
    """How a pipeline uses the module: draws for the batch, then decoding in parallel."""
    keys = [f"{name}_60x73" for name in FORMATS] + ["jpeg_420_81x64", "jpeg_420_33x90"]
    records = tf.stack([encoded(key) for key in keys[:8]])

    def draw(step: tf.Tensor):
        random = RowRandom(tf.stack([7, tf.cast(step, tf.int32)]), 8, slice(0, 8))
        windows = decoding.random_windows(decoding.shapes(records), random.stream("window"))
        return records, windows, random.stream("move").uniform("flip") < 0.5

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    steps = tf.data.Dataset.range(3).map(draw)
    if as_one:
        images = steps.map(lambda *batch: decode_windows(*batch, 24), threads)
    else:
        images = (
            steps.unbatch().map(lambda *one: decoding.decode_window(*one, 24), threads).batch(8)
        )
    return list(images.with_options(options).as_numpy_iterator())


@pytest.mark.slow
@pytest.mark.integration
def test_graphs_of_batches_and_of_images_make_the_same_bytes_with_any_threads() -> None:
    reference = batches(1, as_one=True)
    assert reference[0].shape == (8, 24, 24)
    assert not np.array_equal(reference[0], reference[1])
    for threads, as_one in ((4, True), (3, False)):
        for left, right in zip(reference, batches(threads, as_one), strict=True):
            np.testing.assert_array_equal(left, right)


def test_rows_do_not_depend_on_who_draws_them() -> None:
    shapes = tf.fill([16, 2], 100)
    whole = decoding.random_windows(shapes, source(16)).numpy()
    half = decoding.random_windows(shapes[8:], source(16, rows=slice(8, 16))).numpy()
    np.testing.assert_array_equal(whole[8:], half)
