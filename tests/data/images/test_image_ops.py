# SPDX-License-Identifier: Apache-2.0
"""Image operations against Pillow, from the fixtures of `fixtures/make_pil_fixtures.py`."""

import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data.images import batch_ops
from tests.helpers.pillow import FREE_OF_PARAMETERS, PARAMETRIC
from tests.helpers.pillow import image_fixtures as fixtures


def apply(name: str, images: np.ndarray, value: float) -> np.ndarray:
    values = np.full(len(images), value)
    if name in FREE_OF_PARAMETERS:
        output = getattr(batch_ops, name)(tf.constant(images))
    elif name == "rotate_black":
        zeros = tf.zeros(len(images), tf.int32)
        no_flip = tf.zeros(len(images), tf.bool)
        output = batch_ops.crop_flip_rotate(tf.constant(images), zeros, zeros, no_flip, values, 0)
    else:
        kind = tf.int32 if name == "posterize" else tf.float64
        parameter = tf.cast(values, tf.float32 if name == "solarize" else kind)
        output = getattr(batch_ops, name)(tf.constant(images), parameter)
    return output.numpy()


@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize("name", ["rotate_black", *FREE_OF_PARAMETERS, *PARAMETRIC])
def test_equals_pillow_to_the_bit(name: str, shape: str) -> None:
    images = fixtures()[f"images/{shape}"]
    for i, value in enumerate(fixtures()[f"values/{name}"]):
        expected = fixtures()[f"outputs/{name}/{shape}"][:, i]
        np.testing.assert_array_equal(
            apply(name, images, value), expected, err_msg=f"{name}({value})"
        )


def crop_flip_by_hand(image, top, left, flip, padding):
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    cropped = padded[top : top + height, left : left + width]
    return cropped[:, ::-1] if flip else cropped


@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize("degrees", [None, 0.0, -7.3, 15.0])
def test_crop_then_flip_then_rotate(shape: str, degrees: float | None) -> None:
    """The rotation must not show what the crop cut off: pixels beyond it are black."""
    images = np.repeat(fixtures()[f"images/{shape}"][:1], 5, axis=0)
    top, left = np.array([0, 8, 4, 3, 7]), np.array([8, 0, 4, 1, 6])
    flip = np.array([False, True, False, True, True])
    angles = None if degrees is None else tf.fill([5], degrees)
    actual = batch_ops.crop_flip_rotate(
        tf.constant(images),
        tf.constant(top, tf.int32),
        tf.constant(left, tf.int32),
        flip,
        angles,
        4,
    ).numpy()
    for i in range(5):
        expected = crop_flip_by_hand(images[i], top[i], left[i], flip[i], 4)
        if degrees is not None:
            expected = apply("rotate_black", expected[None], degrees)[0]
        np.testing.assert_array_equal(actual[i], expected)


def test_parameters_belong_to_their_images() -> None:
    images = np.repeat(fixtures()["images/square"][:1], 5, axis=0)
    values = fixtures()["values/brightness"]
    actual = batch_ops.brightness(tf.constant(images), tf.constant(values)).numpy()
    np.testing.assert_array_equal(actual, fixtures()["outputs/brightness/square"][0])


def test_cutout_is_clipped_at_the_border() -> None:
    images = tf.fill([2, 8, 10, 3], tf.constant(9, tf.uint8))
    output = batch_ops.cutout(images, tf.constant([4, 0]), tf.constant([5, 9]), 4).numpy()
    assert (output[0, 2:6, 3:7] == 0).all() and (output[0] == 0).sum() == 4 * 4 * 3
    assert (output[1, :2, 7:] == 0).all() and (output[1] == 0).sum() == 2 * 3 * 3
