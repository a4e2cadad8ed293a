# SPDX-License-Identifier: Apache-2.0
"""Operations on packed pixels, against Pillow and against the operations on bytes."""

import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data.images import packed_ops
from balpoe_jax.data.images.color_jitter import color_jitter
from tests.helpers.pillow import image_fixtures as fixtures

# With the type of their parameter.
OPERATIONS = {
    "invert": None, "autocontrast": None, "equalize": None, "posterize": tf.int32,
    "solarize": tf.float32, "brightness": tf.float32, "color": tf.float32,
    "contrast": tf.float32, "sharpness": tf.float32,
}  # fmt: skip


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)


@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_equals_pillow_to_the_bit(name: str, shape: str) -> None:
    images = fixtures()[f"images/{shape}"]
    kind = OPERATIONS[name]
    for i, value in enumerate(fixtures()[f"values/{name}"]):
        for image, expected in zip(
            images, fixtures()[f"outputs/{name}/{shape}"][:, i], strict=True
        ):
            parameters = () if kind is None else (tf.cast(value, kind),)
            output = getattr(packed_ops, name)(packed_ops.pack(tf.constant(image)), *parameters)
            np.testing.assert_array_equal(packed_ops.unpack(output), expected, f"{name}({value})")


@pytest.mark.parametrize("shape", ["square", "wide"])
def test_color_jitter_equals_pillow_to_the_bit(shape: str) -> None:
    images = fixtures()[f"images/{shape}"][[0, -1]]
    factors, orders = fixtures()["values/jitter_factors"], fixtures()["values/jitter_order"]
    assert len({tuple(order) for order in orders}) == 6
    for factor, order, expected in zip(factors, orders, fixtures()[f"jitter/{shape}"], strict=True):
        for image, jittered in zip(images, expected, strict=True):
            output = color_jitter(
                packed_ops.pack(tf.constant(image)),
                tf.constant(factor, tf.float32),
                tf.constant(order, tf.int32),
            )
            np.testing.assert_array_equal(packed_ops.unpack(output), jittered)


def test_a_pixel_has_red_in_its_lowest_byte() -> None:
    images = noise(2, 5, 7)
    packed = packed_ops.pack(tf.constant(images)).numpy()
    expected = images.astype(np.uint32) @ np.array([1, 1 << 8, 1 << 16], np.uint32)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(packed_ops.unpack(tf.constant(packed)), images)
    np.testing.assert_array_equal(
        packed_ops.to_float(tf.constant(packed)), images.astype(np.float32)
    )


def test_floats_are_truncated() -> None:
    packed = packed_ops.pack(tf.constant([[[0.99, 255.5, 3.0]]])).numpy()
    assert packed == 255 << 8 | 3 << 16


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("whole", [-9, -2, 0, 3, 20])
def test_a_shift_by_whole_pixels_moves_them(whole: int, cubic: bool) -> None:
    image = noise(6, 8)
    packed = packed_ops.pack(tf.constant(image))
    for shift, axis in ((packed_ops.shift_rows, 1), (packed_ops.shift_columns, 0)):
        amounts = tf.fill([image.shape[1 - axis]], tf.constant(whole, tf.float64))
        output = packed_ops.unpack(shift(packed, amounts, tf.constant(cubic), (7, 8, 9))).numpy()
        size = image.shape[axis]
        for position in range(size):
            line = np.take(output, position, axis)
            source = position + whole
            if 0 <= source < size:
                np.testing.assert_array_equal(line, np.take(image, source, axis))
            else:
                assert (line == (7, 8, 9)).all()


def test_columns_are_shifted_as_rows_are() -> None:
    image = noise(6, 8)
    amounts = tf.constant(np.linspace(-3.7, 4.2, 6))
    for cubic in (tf.constant(False), tf.constant(True)):
        rows = packed_ops.shift_rows(packed_ops.pack(tf.constant(image)), amounts, cubic, (1, 2, 3))
        turned = tf.constant(image.transpose(1, 0, 2))
        columns = packed_ops.shift_columns(packed_ops.pack(turned), amounts, cubic, (1, 2, 3))
        np.testing.assert_array_equal(columns, tf.transpose(rows))


@pytest.mark.integration
def test_it_runs_within_other_graphs_and_in_parallel() -> None:
    images = noise(16, 9, 9)
    dataset = tf.data.Dataset.from_tensor_slices(images)
    dataset = dataset.map(packed_ops.pack, 4).map(packed_ops.equalize, 4)
    for image, output in zip(images, dataset.as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(
            packed_ops.equalize(packed_ops.pack(tf.constant(image))), output
        )
