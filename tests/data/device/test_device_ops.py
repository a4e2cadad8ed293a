# SPDX-License-Identifier: Apache-2.0
"""Image operations on devices against Pillow, from the fixtures that those of tf.data pass."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data.device import colours, hue, moves, operations, randaugment, tones
from balpoe_jax.data.device.arithmetic import divide
from balpoe_jax.data.device.autoaugment import TablePolicy, numbers_of
from balpoe_jax.data.device.blur import blur, box_weights
from balpoe_jax.data.device.jitter import jitter, whole_turns
from balpoe_jax.data.device.packing import pack, packed_colour, unpack
from balpoe_jax.data.images import batch_ops
from balpoe_jax.data.images.blur import box_weights as box_weights_by_tensorflow
from balpoe_jax.data.settings import AugmentSettings
from tests.helpers.pillow import (
    EXACT,
    FREE_OF_PARAMETERS,
    GEOMETRIC,
    PARAMETRIC,
    image_fixtures,
    view_fixtures,
)

KINDS = (
    "none", "nearest", "rows", "columns", "points", "autocontrast", "equalize", "brightness",
    "contrast", "color", "sharpness",
)  # fmt: skip
KIND_OF = {
    **operations.KIND_OF,
    **dict.fromkeys(("rotate", "translate_x", "translate_y"), "nearest"),
    "shear_x": "rows",
    "shear_y": "columns",
}
GREY = packed_colour((128, 128, 128))


@cache
def tables() -> dict[str, jax.Array]:
    made = {"autocontrast": tones.autocontrast_table(), **hue.hue_tables()}
    # The first call may come from a traced function, and what is kept must not be its tracers.
    with jax.ensure_compile_time_eval():
        return {name: jnp.asarray(table) for name, table in made.items()}


def over_images(function: Any) -> Any:
    """A function of packed images and numbers, of batches of bytes."""
    mapped = jax.vmap(function)
    return jax.jit(lambda images, *numbers: unpack(mapped(pack(images), *numbers)))


@cache
def run(kinds: tuple[str, ...], fill: int, vectorised: bool) -> Any:
    choose = operations.compute_all if vectorised else jax.lax.switch

    def one(image: jax.Array, numbers: Any, made: Any) -> jax.Array:
        return operations.apply(image, numbers, made, kinds, fill, choose)

    def run(images: Any, numbers: Any) -> np.ndarray:
        return np.asarray(compiled(images, numbers, tables()))

    @jax.jit
    def compiled(images: jax.Array, numbers: Any, made: Any) -> jax.Array:
        if vectorised:
            changed = jax.vmap(one, (0, 0, None))(pack(images), numbers, made)
        else:
            changed = jax.lax.map(lambda row: one(*row, made), (pack(images), numbers))
        return unpack(changed)

    return run


def outputs(names: list[str], images: np.ndarray, values: np.ndarray, vectorised: bool = True):
    """What one program makes of images, each with an operation and a value of its own."""
    numbers = numbers_of(names, np.asarray(values, np.float64), KINDS, *images.shape[1:3])
    numbers["kind"] = np.array([KINDS.index(KIND_OF[name]) for name in names], np.uint8)
    return run(KINDS, GREY, vectorised)(images, numbers)


@cache
def all_outputs(shape: str, vectorised: bool) -> dict[str, np.ndarray]:
    """Of every operation, in the form of the fixtures: `[images, values, H, W, 3]`."""
    images = image_fixtures()[f"images/{shape}"]
    names, chosen, values = [], [], []
    for name in (*FREE_OF_PARAMETERS, *PARAMETRIC):
        for i in range(len(images)):
            for value in image_fixtures()[f"values/{name}"]:
                names.append(name)
                chosen.append(i)
                values.append(value)
    made = outputs(names, images[chosen], np.array(values), vectorised)
    found = {}
    for name in (*FREE_OF_PARAMETERS, *PARAMETRIC):
        own = made[np.array(names) == name]
        found[name] = own.reshape(len(images), -1, *images.shape[1:])
    return found


@pytest.mark.integration
@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize("name", [*FREE_OF_PARAMETERS, *PARAMETRIC])
def test_equals_pillow_to_the_bit(name: str, shape: str) -> None:
    actual, expected = all_outputs(shape, True)[name], image_fixtures()[f"outputs/{name}/{shape}"]
    error = actual.astype(int) - expected
    if name in ("shear_x", "shear_y") and shape == "square":
        # Many exact results are whole at 0.2, and Pillow makes two or one of them one less.
        assert image_fixtures()[f"values/{name}"][4] == 0.2
        assert np.abs(error[:, 4]).max() == 1
        assert (error[:, 4] != 0).sum() == {"shear_x": 2, "shear_y": 1}[name]
        error = error[:, :4]
    assert not error.any()


@pytest.mark.integration
def test_one_by_one_as_all_at_once() -> None:
    """The ways of CPUs and of accelerators."""
    for name, expected in all_outputs("wide", True).items():
        np.testing.assert_array_equal(all_outputs("wide", False)[name], expected, name)


@pytest.mark.integration
def test_operations_are_those_of_tensorflow_at_every_magnitude() -> None:
    """Of all variants of AutoAugment, shears among them, on images of several kinds."""
    random = np.random.default_rng(0)
    images = np.concatenate(
        [image_fixtures()["images/square"], random.integers(0, 256, (3, 32, 32, 3), np.uint8)]
    )
    for variants in TablePolicy("autoaugment_cifar", 32, 32).variants:
        names = [name for name in variants.names[1:] for _ in images]
        values = np.repeat(variants.parameters[1:], len(images))
        actual = outputs(names, np.tile(images, (len(values) // len(images), 1, 1, 1)), values)
        for i, (name, value) in enumerate(
            zip(variants.names[1:], variants.parameters[1:], strict=True)
        ):
            operation = getattr(batch_ops, name)
            whole = tf.int32 if name == "posterize" else tf.float32
            parameters = tf.cast(tf.fill([len(images)], value), whole)
            free = name in FREE_OF_PARAMETERS
            expected = operation(tf.constant(images), *([] if free else [parameters]))
            own = actual[i * len(images) : (i + 1) * len(images)]
            np.testing.assert_array_equal(own, expected, f"{name}({value})")


@pytest.mark.parametrize("shape", ["square", "wide"])
def test_rotation_with_black_corners_equals_pillow_to_the_bit(shape: str) -> None:
    images = image_fixtures()[f"images/{shape}"]
    degrees = image_fixtures()["values/rotate_black"]
    matrix = moves.rotation_matrices(np.tile(degrees, len(images)), *images.shape[1:3])
    index = np.repeat(np.arange(len(images), dtype=np.int32), len(degrees))
    actual = jax.jit(moves.read_moved)(images, index, {"matrix": matrix})
    expected = image_fixtures()[f"outputs/rotate_black/{shape}"]
    np.testing.assert_array_equal(actual.reshape(expected.shape), expected)


@cache
def all_by_randaugment(shape: str) -> dict[str, np.ndarray]:
    images = image_fixtures()[f"images/{shape}"][[0, -1]]
    policy = randaugment.RandAugment(AugmentSettings(), *images.shape[1:3])
    draws = image_fixtures()["values/randaugment"]
    level, sign, cubic = draws[:, 0] / 10, draws[:, 1], draws[:, 2] > 0
    operation = np.repeat(np.arange(len(randaugment.NAMES)), len(draws))
    repeated = (np.tile(x, len(randaugment.NAMES)) for x in (level, sign, cubic))
    numbers = policy.numbers(operation, *repeated)
    numbers = jax.tree.map(lambda leaf: np.repeat(leaf, len(images), axis=0), numbers)
    fill = packed_colour(AugmentSettings().fill)
    made = run(randaugment.KINDS, fill, True)(np.tile(images, (len(operation), 1, 1, 1)), numbers)
    made = made.reshape(len(randaugment.NAMES), len(draws), *images.shape)
    return dict(zip(randaugment.NAMES, made, strict=True))


@pytest.mark.integration
@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize("name", [*EXACT, *GEOMETRIC])
def test_operations_of_randaugment_are_those_of_pillow(name: str, shape: str) -> None:
    """Closer than the tf.data ones: geometric operations are off by one level in a few values.

    At whole magnitudes many exact results are whole numbers, and Pillow's rounding decides.
    """
    actual, expected = (
        all_by_randaugment(shape)[name],
        image_fixtures()[f"randaugment/{name}/{shape}"],
    )
    for values, own, other in zip(
        image_fixtures()["values/randaugment"], actual, expected, strict=True
    ):
        error = np.abs(own.astype(int) - other)
        print(name, shape, values, (error > 0).mean(), error.max())
        assert error.max() <= (1 if name in GEOMETRIC else 0), values
        assert (error > 0).mean() < (0.06 if values[0] == 10 else 0.0005), values


@pytest.mark.integration
def test_autocontrast_errs_as_pillow_for_every_stretch() -> None:
    """Of all ranges all values, by the formula of Pillow in float64."""
    low, high = (x.reshape(-1) for x in np.indices((256, 256)))
    low, high = low[low <= high], high[low <= high]
    stretch = jax.jit(jax.vmap(tones.stretch, (0, None)))
    for first in range(0, len(low), 4096):
        ends = [x[first : first + 4096, None] for x in (low, high)]
        values = np.clip(np.arange(256), *ends)
        pixels = (values * 0x010101).astype(np.uint32)
        scale = 255 / np.maximum(ends[1] - ends[0], 1).astype(np.float64)
        expected = np.clip(values * scale + -ends[0] * scale, 0, 255).astype(np.uint32)
        expected = np.where(ends[0] == ends[1], values, expected).astype(np.uint32) * 0x010101
        np.testing.assert_array_equal(stretch(pixels, tones.autocontrast_table()), expected)


@pytest.mark.integration
def test_division_by_floats_is_that_of_whole_numbers() -> None:
    random = np.random.default_rng(0)
    divisor = np.concatenate([np.arange(1, 5000), random.integers(1, 2**31, 5000)]).astype(np.int64)
    for quotient in (0, 1, 254, 255, 1000):
        for rest in (0, divisor // 2, divisor - 1):
            dividend = quotient * divisor + rest
            fits = dividend < 2**31
            actual = divide(jnp.asarray(dividend[fits], jnp.int32), jnp.asarray(divisor[fits]))
            np.testing.assert_array_equal(actual, quotient)


def test_smoothing_divides_by_26() -> None:
    """By a product with a rounded reciprocal, of every total that occurs."""
    dividend = 2 * np.arange(13 * 255 + 1) + 13
    np.testing.assert_array_equal(dividend * 40330 >> 20, dividend // 26)


def test_both_ways_of_counting_agree() -> None:
    parts = np.random.default_rng(0).integers(0, 256, (3, 700)).astype(np.int32)
    parts[1] = 255
    parts[2, :350] = 0
    expected = [[(part < value).sum() for value in range(256)] for part in parts]
    for way in (tones.below_by_counting, tones.below_by_product):
        np.testing.assert_array_equal(jax.jit(way)(jnp.asarray(parts)), expected)


def test_hue_equals_pillow_to_the_bit() -> None:
    hues, colours_ = view_fixtures()["hues"], view_fixtures()["colours"]
    change = over_images(lambda image, turn: hue.change_hue(image, turn, tables()))
    turns = whole_turns(hues).astype(np.int32)
    actual = change(np.tile(colours_, (len(hues), 1, 1, 1)), turns)
    np.testing.assert_array_equal(actual, view_fixtures()["turned"])


@pytest.mark.slow
def test_whole_numbers_make_colours_of_hues_as_floats_do() -> None:
    """All 16.7 million, against Pillow's mix of single and double precision."""
    convert = jax.jit(lambda *hsv: unpack(hue.to_rgb(*hsv)))
    saturation, value = np.mgrid[:256, :256].astype(np.int32)
    for number in range(256):
        actual = np.asarray(convert(jnp.full_like(saturation, number), saturation, value))
        position = np.float64(number) * 6 / 255
        sector = int(position)
        fraction = np.float32(position - sector)
        single = (saturation / 255).astype(np.float32)
        share, wide = single.astype(np.float64), np.float64(fraction)
        low = np.floor(value * (1 - share) + 0.5)
        falling = np.floor(value * (1 - (single * fraction).astype(np.float64)) + 0.5)
        rising = np.floor(value * (1 - share * (1 - wide)) + 0.5)
        expected = [
            (value, rising, low), (falling, value, low), (low, value, rising),
            (low, falling, value), (rising, low, value), (value, low, falling),
        ][sector % 6]  # fmt: skip
        np.testing.assert_array_equal(actual, np.stack(expected, axis=-1), f"hue {number}")


def test_hue_is_that_of_tensorflow_for_many_colours() -> None:
    from balpoe_jax.data.images import packed_ops
    from balpoe_jax.data.images.color_jitter import change_hue

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, 512, 512, 3), np.uint8)
    images[1] //= 32  # few values, and so greys, ties and whole results
    change = over_images(lambda image, turn: hue.change_hue(image, turn, tables()))
    for factor in (0.0, 0.37):
        turn = np.full(2, whole_turns(np.array([factor], np.float32))[0], np.int32)
        for image, actual in zip(images, change(images, turn), strict=True):
            packed = packed_ops.pack(tf.constant(image))
            expected = packed_ops.unpack(change_hue(packed, tf.constant(factor, tf.float32)))
            np.testing.assert_array_equal(actual, expected)


def test_blur_equals_pillow_to_the_bit() -> None:
    images, sigmas = view_fixtures()["images"], view_fixtures()["sigmas"]
    weights = np.repeat(box_weights(sigmas), len(images), axis=0)
    actual = over_images(blur)(np.tile(images, (len(sigmas), 1, 1, 1)), weights)
    expected = view_fixtures()["blurred"]
    np.testing.assert_array_equal(actual.reshape(expected.shape), expected)


def test_boxes_are_those_of_tensorflow() -> None:
    sigmas = np.linspace(0.1, 2.0, 5000, dtype=np.float32)
    weights = box_weights(sigmas)
    np.testing.assert_array_equal(weights, box_weights_by_tensorflow(tf.constant(sigmas)))
    # A sum of white pixels fits into 32 bits.
    assert ((weights.astype(np.int64) @ [1, 2, 2]) * 255 + (1 << 23) < 1 << 32).all()


def test_windows_are_enlarged_as_pillow_does_to_the_bit() -> None:
    images, windows = view_fixtures()["images"], view_fixtures()["windows"]
    index = np.tile(np.arange(len(images), dtype=np.int32), len(windows))
    repeated = np.repeat(windows, len(images), axis=0).astype(np.int16)
    expected = view_fixtures()["cropped"].reshape(-1, *images.shape[1:])
    actual = jax.jit(moves.read_moved)(images, index, {"window": repeated})
    np.testing.assert_array_equal(actual, expected)
    flip = np.arange(len(index)) % 2 > 0
    flipped = jax.jit(moves.read_moved)(images, index, {"window": repeated, "flip": flip})
    mirrored = np.where(flip[:, None, None, None], expected[:, :, ::-1], expected)
    np.testing.assert_array_equal(flipped, mirrored)


@pytest.mark.integration
def test_jitter_with_hue_equals_pillow_to_the_bit() -> None:
    images, factors = view_fixtures()["images"], view_fixtures()["jitter_factors"]
    drawn = {
        "factors": factors[:, :3],
        "turn": whole_turns(factors[:, 3]),
        "order": view_fixtures()["jitter_orders"].astype(np.uint8),
    }
    drawn = jax.tree.map(lambda leaf: np.repeat(leaf, len(images), axis=0), drawn)
    repeated = np.tile(images, (len(factors), 1, 1, 1))
    change = over_images(lambda image, own: jitter(image, own, tables()))
    expected = view_fixtures()["jittered"]
    np.testing.assert_array_equal(change(repeated, drawn).reshape(expected.shape), expected)
    left_alone = {**drawn, "order": np.full_like(drawn["order"], 4)}
    np.testing.assert_array_equal(change(repeated, left_alone), repeated)


@pytest.mark.parametrize("shape", ["square", "wide"])
def test_jitter_without_hue_equals_pillow_to_the_bit(shape: str) -> None:
    images = image_fixtures()[f"images/{shape}"][[0, -1]]
    factors = image_fixtures()["values/jitter_factors"].astype(np.float32)
    order = image_fixtures()["values/jitter_order"].astype(np.uint8)
    drawn = {"factors": np.repeat(factors, 2, axis=0), "order": np.repeat(order, 2, axis=0)}
    change = over_images(lambda image, own: jitter(image, own, {}))
    expected = image_fixtures()[f"jitter/{shape}"]
    actual = change(np.tile(images, (len(factors), 1, 1, 1)), drawn)
    np.testing.assert_array_equal(actual.reshape(expected.shape), expected)


def test_without_colour_an_image_is_pillows_grey_one() -> None:
    actual = over_images(colours.gray)(view_fixtures()["images"])
    np.testing.assert_array_equal(actual, view_fixtures()["grey"])
