# SPDX-License-Identifier: Apache-2.0
"""Views on devices: whole batches against their phases, the draws, and where they run."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from jax.sharding import Mesh, PartitionSpec

from balpoe_jax.data.device.randaugment import KINDS, NAMES
from balpoe_jax.data.device.randomness import RowUniforms, generator
from balpoe_jax.data.device.views import DeviceView
from balpoe_jax.data.images import batch_ops, color_jitter, packed_ops
from balpoe_jax.data.images.blur import blur, box_weights
from balpoe_jax.data.images.resize import enlarge_windows
from balpoe_jax.data.settings import AUTOAUGMENT_CIFAR, BLUR_SIGMA, AugmentSettings
from tests.helpers.augmentations import SIM
from tests.helpers.draws import within_four_sigma
from tests.helpers.pillow import FREE_OF_PARAMETERS

SHAPE = (32, 32, 3)
LONG = AugmentSettings(
    crop_padding=4, flip=True, rotation=15.0, policy="autoaugment_cifar", cutout=16
)
RAND = AugmentSettings(crop_padding=2, flip=True, policy="randaugment", randaugment_layers=3)


@cache
def examples(side: int = 32, count: int = 50) -> np.ndarray:
    """Noise, and half of it with little contrast."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    images[::2] = images[::2] // 4 + 80
    return images


def index(rows: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 50, rows).astype(np.int32)


def made(view: DeviceView, drawn: Any, images: np.ndarray, rows: int) -> np.ndarray:
    tables = jax.tree.map(jnp.asarray, view.tables())
    return np.asarray(jax.jit(view.augment)(images, index(rows), drawn, tables))


def moved_by_hand(drawn: dict[str, np.ndarray], degrees: np.ndarray | None, padding: int):
    rows = len(drawn["flip"])
    images = tf.constant(examples()[index(rows)])
    if "window" in drawn:
        images = enlarge_windows(images, tf.constant(drawn["window"].astype(np.int32)))
    zero = np.zeros(rows)
    top, left = (drawn.get(name, zero).astype(np.int32) + padding for name in ("top", "left"))
    return batch_ops.crop_flip_rotate(images, top, left, drawn["flip"], degrees, padding).numpy()


@pytest.mark.slow
@pytest.mark.integration
def test_a_batch_of_the_long_recipe_is_what_its_stages_make() -> None:
    """Crop, flip, rotation, AutoAugment and Cutout by the operations of the host, to the bit."""
    rows = 400
    view = DeviceView(LONG, SHAPE)
    drawn = view.draw(generator(3, "augment", 7), rows)
    way = view._ways[0]
    uniforms = RowUniforms(generator(3, "augment", 7).random((rows, way.width)), way._widths)
    degrees = (2 * uniforms.one("degrees") - 1) * 15.0
    images = moved_by_hand(drawn["moves"], degrees, 4)
    for position, variants in enumerate(way._policy.variants):
        chosen = drawn["policy"][:, position]
        for name in set(variants.names) - {"none"}:
            own = np.array([variants.names[number] == name for number in chosen])
            kind = np.int32 if name == "posterize" else np.float32
            parameters = variants.parameters[chosen[own]].astype(kind)
            arguments = [] if name in FREE_OF_PARAMETERS else [tf.constant(parameters)]
            images[own] = getattr(batch_ops, name)(tf.constant(images[own]), *arguments)
    top, left = drawn["cutout"].astype(np.int32).T
    expected = batch_ops.cutout(tf.constant(images), top, left, 16)
    np.testing.assert_array_equal(made(view, drawn, examples(), rows), expected)


@pytest.mark.integration
@pytest.mark.slow_cases("0.0-shape1", "15.0-shape0", "15.0-shape1")
@pytest.mark.parametrize("shape", [SHAPE, (16, 24, 3)])
@pytest.mark.parametrize("rotation", [0.0, 15.0])
def test_the_way_of_tpus_makes_the_same_images(
    rotation: float, shape: tuple[int, int, int]
) -> None:
    """Every pair of variants that may be drawn, and batches that are all of one kind."""
    settings = dataclasses.replace(LONG, rotation=rotation)
    view = DeviceView(settings, shape)
    pairs = [
        (first, second)
        for pair in range(25)
        for first in (0, 1 + 2 * pair, 2 + 2 * pair)
        for second in (0, 1 + 2 * pair, 2 + 2 * pair)
    ]
    # Equalized twice, sharpened twice, nothing: more than are computed at a time, and none.
    alike = [(17, 17)] * 90 + [(5, 5)] * 135 + [(0, 0)] * 225
    tables = jax.tree.map(jnp.asarray, view.tables())
    images = np.random.default_rng(0).integers(0, 256, (50, *shape), np.uint8)
    images[::2] = images[::2] // 4 + 80
    images[::5] = images[::5, :1, :1]
    one, other = jax.jit(view.augment_packed), jax.jit(view.augment_together)
    for policy in (pairs, alike[:225], alike[-225:]):
        drawn = view.draw(generator(3, "augment", 7), 225)
        drawn["policy"] = np.array(policy, np.uint8)
        arguments = (images, index(225), drawn, tables)
        np.testing.assert_array_equal(other(*arguments), one(*arguments))


def test_a_tpu_has_its_way_for_autoaugment_alone() -> None:
    assert DeviceView(LONG, SHAPE)._ways[0].has_table_alone
    for changed in (
        dataclasses.replace(LONG, blur=0.5),
        RAND,
        dataclasses.replace(LONG, policy="none"),
    ):
        assert not DeviceView(changed, SHAPE)._ways[0].has_table_alone


@pytest.mark.slow
def test_a_contrastive_view_is_what_its_stages_make() -> None:
    """Window, flip, jitter, grey and blur by the operations of the host, to the bit."""
    rows = 40
    view = DeviceView(SIM, SHAPE)
    drawn = view.draw(generator(3, "view", 7), rows)
    actual = made(view, drawn, examples(), rows)
    way = view._ways[0]
    uniforms = RowUniforms(generator(3, "view", 7).random((rows, way.width)), way._widths)
    low, high = BLUR_SIGMA
    sigma = (low + uniforms.one("sigma") * (high - low)).astype(np.float32)
    hue = ((2 * uniforms.many("factors") - 1) * SIM.hue).astype(np.float32)[:, 3]
    for i, image in enumerate(moved_by_hand(drawn["moves"], None, 0)):
        image = packed_ops.pack(tf.constant(image))
        order = drawn["jitter"]["order"][i]
        if order[0] < 4:
            factors = np.append(drawn["jitter"]["factors"][i], hue[i])
            image = color_jitter.color_jitter(
                image, tf.constant(factors), tf.constant(order.astype(np.int32))
            )
        if drawn["grayscale"][i]:
            image = packed_ops.color(image, 0.0)
        if drawn["blurred"][i]:
            image = blur(image, box_weights(tf.constant(sigma[i])))
        np.testing.assert_array_equal(actual[i], packed_ops.unpack(image), f"row {i}")


@pytest.mark.slow
def test_a_policy_follows_everything_else() -> None:
    """RandAugment is applied to what the settings without it make, layer by layer."""
    rows, one_layer = 60, dataclasses.replace(AugmentSettings(), policy="randaugment")
    one_layer = dataclasses.replace(one_layer, randaugment_layers=1)
    view, rest = DeviceView(RAND, SHAPE), dataclasses.replace(RAND, policy="none")
    drawn = view.draw(generator(0, "augment", 0), rows)
    images = made(DeviceView(rest, SHAPE), {"moves": drawn["moves"]}, examples(), rows)
    alone = DeviceView(one_layer, SHAPE)
    tables = view.tables()
    for layer in range(3):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[:, layer : layer + 1], drawn["policy"])
        positions = np.arange(rows, dtype=np.int32)
        images = jax.jit(alone.augment)(images, positions, {"moves": {}, "policy": own}, tables)
    np.testing.assert_array_equal(made(view, drawn, examples(), rows), images)


@pytest.mark.slow
def test_each_image_is_augmented_in_one_of_two_ways() -> None:
    """With even odds; the ways are those of views of one way alone."""
    rows, one = 60, AugmentSettings(crop_padding=2, flip=True)
    view = DeviceView(one, SHAPE, SIM)
    drawn = view.draw(generator(0, "augment", 0), rows)
    first = made(DeviceView(one, SHAPE), drawn["first"], examples(), rows)
    second = made(DeviceView(SIM, SHAPE), drawn["second"], examples(), rows)
    takes_second = drawn["takes_second"][:, None, None, None]
    expected = np.where(takes_second, second, first)
    np.testing.assert_array_equal(made(view, drawn, examples(), rows), expected)
    many = view.draw(generator(0, "augment", 0), 10_000)
    assert within_four_sigma(many["takes_second"], 0.5)
    for other in (many["first"]["moves"]["flip"], many["second"]["moves"]["flip"]):
        assert within_four_sigma(other & many["takes_second"], 0.25)
    both = many["first"]["moves"]["flip"] & many["second"]["moves"]["flip"]
    assert within_four_sigma(both, 0.25)


def test_no_settings_no_change() -> None:
    view = DeviceView(AugmentSettings(), SHAPE)
    drawn = view.draw(generator(0, "augment", 0), 8)
    assert view.tables() == {} and jax.tree.leaves(drawn) == []
    np.testing.assert_array_equal(made(view, drawn, examples(), 8), examples()[index(8)])


@pytest.mark.parametrize("settings", [LONG, SIM, RAND])
def test_draws_are_a_function_of_the_source_and_the_row(settings: AugmentSettings) -> None:
    for view in (DeviceView(settings, SHAPE), DeviceView(settings, SHAPE, LONG)):
        whole = view.draw(generator(2**62, "augment", 2**40), 64)
        again = view.draw(generator(2**62, "augment", 2**40), 16)
        for leaf, other in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
            assert leaf.shape == (64, *other.shape[1:])
            np.testing.assert_array_equal(leaf[:16], other)
        for source in (
            generator(2**62 + 1, "augment", 2**40),
            generator(2**62, "view", 2**40),
            generator(2**62, "augment", 2**40 - 1),
        ):
            changed = view.draw(source, 64)
            leaves = zip(jax.tree.leaves(whole), jax.tree.leaves(changed), strict=True)
            assert any((leaf != other).any() for leaf, other in leaves)


def many(settings: AugmentSettings, shape: tuple[int, int, int] = SHAPE) -> dict[str, Any]:
    return DeviceView(settings, shape).draw(generator(0, "augment", 0), 20_000)


def test_crops_flips_and_rotations_are_uniform() -> None:
    drawn = many(dataclasses.replace(LONG, crop_padding=1))
    moves = drawn["moves"]
    assert within_four_sigma(moves["flip"], 0.5)
    for top in (-1, 0, 1):
        for left in (-1, 0, 1):
            assert within_four_sigma((moves["top"] == top) & (moves["left"] == left), 1 / 9)
    degrees = np.degrees(np.arcsin(moves["matrix"][:, 2] / 2**16))
    assert -15.01 < degrees.min() < -14.9 and 14.9 < degrees.max() < 15.01
    assert within_four_sigma(degrees < 0, 0.5) and within_four_sigma(np.abs(degrees) < 7.5, 0.5)
    for axis in (0, 1):
        assert within_four_sigma(drawn["cutout"][:, axis] < 8, 0.25)
        assert set(np.unique(drawn["cutout"][:, axis])) == set(range(32))


def test_windows_follow_the_rule_of_the_random_resized_crop() -> None:
    for shape in ((32, 32, 3), (16, 40, 3)):
        window = many(SIM, shape)["moves"]["window"].astype(int)
        top, left, height, width = window.T
        assert (window >= 0).all() and (height > 0).all() and (width > 0).all()
        assert (top + height <= shape[0]).all() and (left + width <= shape[1]).all()
    # Of square images, against the host's windows.
    from balpoe_jax.data.images.decoding import random_windows
    from tests.helpers.draws import source

    own = many(SIM)["moves"]["window"].astype(float)
    shapes = tf.tile([[32, 32]], [20_000, 1])
    other = random_windows(shapes, source(20_000), (0.2, 1.0)).numpy().astype(float)
    for i in range(4):
        deviation = np.sqrt((own[:, i].var() + other[:, i].var()) / 20_000)
        assert abs(own[:, i].mean() - other[:, i].mean()) < 4 * deviation
    areas = [np.sort(x[:, 2] * x[:, 3]) for x in (own, other)]
    grid = np.linspace(0, 1024, 50)
    below = [np.searchsorted(area, grid) / 20_000 for area in areas]
    # Kolmogorov and Smirnov's bound at one in ten thousand.
    assert np.abs(below[0] - below[1]).max() < 2.23 * np.sqrt(2 / 20_000)


def test_every_rule_of_autoaugment_runs_as_often_as_it_says() -> None:
    view = DeviceView(LONG, SHAPE)
    drawn = many(LONG)["policy"]
    for position, variants in enumerate(view._ways[0]._policy.variants):
        names = np.array(variants.names)[drawn[:, position]]
        for pair, rules in enumerate(AUTOAUGMENT_CIFAR):
            name, probability, _ = rules[position]
            for negative in (0, 1):
                number = 1 + 2 * pair + negative
                assert variants.names[number] == name
                assert within_four_sigma(drawn[:, position] == number, probability / 50)
        rest = 1 - sum(rules[position][1] for rules in AUTOAUGMENT_CIFAR) / 25
        assert within_four_sigma(names == "none", rest)


def test_color_jitter_and_its_kin_are_drawn_as_often_and_as_strongly_as_they_say() -> None:
    drawn = many(SIM)
    assert within_four_sigma(drawn["grayscale"], 0.2) and within_four_sigma(drawn["blurred"], 0.5)
    factors, order = drawn["jitter"]["factors"], drawn["jitter"]["order"]
    jittered = order[:, 0] < 4
    assert within_four_sigma(jittered, 0.8) and (order[~jittered] == 4).all()
    for i in range(3):
        deviation = factors[:, i] - 1
        assert -0.4001 <= deviation.min() < -0.396 and 0.396 < deviation.max() <= 0.4001
        assert within_four_sigma(np.abs(deviation) < 0.2, 0.5)
    assert set(np.unique(drawn["jitter"]["turn"])) == set(range(-25, 26))
    codes, counts = np.unique(order[jittered] @ [64, 16, 4, 1], return_counts=True)
    mean = jittered.sum() / 24
    assert len(codes) == 24 and ((counts - mean) ** 2 / mean).sum() < 49.7  # 99.9 %, 23 degrees
    low, high = BLUR_SIGMA
    half = box_weights(tf.constant((low + high) / 2)).numpy()[0]
    assert within_four_sigma(drawn["blur"][:, 0] < half, 0.5)


def test_randaugment_draws_as_the_hosts() -> None:
    drawn = many(RAND)["policy"]
    kinds = np.array(KINDS)[drawn["kind"]]
    assert kinds.shape == (20_000, 3)
    assert within_four_sigma(kinds == "none", 0.5)
    times = {"points": 4, "rows": 2, "columns": 2}
    assert len(NAMES) == 16
    for kind in set(KINDS) - {"none"}:
        assert within_four_sigma(kinds == kind, times.get(kind, 1) / 30), kind
    twice = (kinds[:, 0] == kinds[:, 1]) & (kinds[:, 0] == "equalize")
    assert within_four_sigma(twice, 1 / 900)
    level = (drawn["factor"] - 0.1) / 1.8
    assert within_four_sigma(level > 0.9999, 0.5)
    below = 10 * (1 - level[level < 0.9999])
    assert abs(below.mean() - 0.5 * np.sqrt(2 / np.pi)) < 4 * 0.3 / np.sqrt(below.size)
    first = drawn["lines"]["first"][kinds == "rows"][:, -1]
    assert within_four_sigma(first < 0, 0.5)
    cubic = (drawn["lines"]["weights"][kinds == "rows"][:, :, 0, 0] != 0).any(axis=1)
    assert within_four_sigma(cubic, 0.5)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((LONG, None), id="long"),
        pytest.param((AugmentSettings(flip=True), SIM), id="either"),
        pytest.param((RAND, None), id="randaugment"),
    ],
)
def test_the_same_images_under_scan_and_on_several_devices(settings: Any) -> None:
    side, rows = 8, 8
    one, other = settings
    view = DeviceView(dataclasses.replace(one, cutout=2), (side, side, 3), other)
    images, tables = examples(side), jax.tree.map(jnp.asarray, view.tables())
    steps = [view.draw(generator(0, "augment", step), rows) for step in range(2)]
    augment = jax.jit(view.augment)
    expected = [augment(images, index(rows), drawn, tables) for drawn in steps]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)

    def step(positions: jax.Array, drawn: Any, tables: Any) -> jax.Array:
        return view.augment(jnp.asarray(images), positions, drawn, tables)

    scanned = jax.jit(
        lambda stacked, tables: jax.lax.scan(
            lambda carry, drawn: (carry, step(index(rows), drawn, tables)), 0, stacked
        )[1]
    )(stacked, tables)
    np.testing.assert_array_equal(scanned, np.stack(expected))
    split, same = PartitionSpec("batch"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    sharded = jax.jit(
        jax.shard_map(view.augment, mesh=mesh, in_specs=(same, split, split, same), out_specs=split)
    )(images, index(rows), steps[0], tables)
    np.testing.assert_array_equal(sharded, expected[0])
    by_device = partial(jax.tree.map, lambda leaf: leaf.reshape(4, rows // 4, *leaf.shape[1:]))
    mapped = jax.pmap(view.augment, in_axes=(None, 0, 0, None))(
        images, by_device(index(rows)), by_device(steps[0]), tables
    )
    np.testing.assert_array_equal(np.asarray(mapped).reshape(expected[0].shape), expected[0])
