# SPDX-License-Identifier: Apache-2.0
"""The draws of augmentation: their statistics, and what they depend on."""

import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data.images import autoaugment, packed_ops
from balpoe_jax.data.images.augment import augment_batch, draw_changes, normalize
from balpoe_jax.data.randomness import fold_in
from balpoe_jax.data.settings import AUTOAUGMENT_CIFAR, AugmentSettings
from balpoe_jax.errors import UserError
from tests.helpers.draws import noise, source, within_four_sigma

EVERYTHING = AugmentSettings(
    crop_padding=4, flip=True, rotation=15.0, policy="autoaugment_cifar", cutout=16
)


PHOTOS = AugmentSettings(flip=True, color_jitter=(0.4, 0.4, 0.4), policy="randaugment")


@pytest.mark.integration
@pytest.mark.slow_cases("settings1")
@pytest.mark.parametrize("settings", [EVERYTHING, PHOTOS])
def test_same_source_same_images_and_another_seed_others(settings: AugmentSettings) -> None:
    images = noise(32)
    first = augment_batch(images, source(32), settings).numpy()
    np.testing.assert_array_equal(first, augment_batch(images, source(32), settings).numpy())
    other = augment_batch(images, source(32, seed=1), settings).numpy()
    changed = (first != other).reshape(32, -1).any(axis=1)
    assert changed.mean() > 0.9


@pytest.mark.integration
@pytest.mark.slow_cases("settings1")
@pytest.mark.parametrize("settings", [EVERYTHING, PHOTOS])
def test_rows_do_not_depend_on_who_makes_them(settings: AugmentSettings) -> None:
    """Two hosts make the halves of the batch that one host makes."""
    images = noise(32)
    whole = augment_batch(images, source(32), settings).numpy()
    for rows in (slice(0, 16), slice(16, 32)):
        part = augment_batch(images[rows], source(32, rows=rows), settings).numpy()
        np.testing.assert_array_equal(part, whole[rows])


def test_no_settings_no_change() -> None:
    images = noise(8)
    np.testing.assert_array_equal(augment_batch(images, source(8), AugmentSettings()), images)


def test_crops_are_uniform_over_all_corners() -> None:
    """A single lit pixel in the middle tells the corner of its crop."""
    image = np.zeros((16, 16, 3), np.uint8)
    image[8, 8] = 255
    images = tf.constant(np.broadcast_to(image, (8100, 16, 16, 3)))
    output = augment_batch(images, source(8100), AugmentSettings(crop_padding=1)).numpy()
    positions = output[..., 0].reshape(8100, -1).argmax(axis=1)
    found, times = np.unique(positions, return_counts=True)
    assert set(found) == {16 * row + column for row in (7, 8, 9) for column in (7, 8, 9)}
    assert all(within_four_sigma(positions == position, 1 / 9) for position in found)
    assert times.sum() == 8100


def test_half_of_the_images_are_mirrored() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, 0] = 255
    images = tf.constant(np.broadcast_to(image, (4000, 4, 4, 3)))
    output = augment_batch(images, source(4000), AugmentSettings(flip=True)).numpy()
    assert within_four_sigma(output[:, 0, 3, 0] == 255, 0.5)


def test_rotations_are_uniform_within_their_limits() -> None:
    """Where a pixel far from the centre lands gives the angle, to the width of a pixel."""
    side, radius = 101, 45
    image = np.zeros((side, side, 3), np.uint8)
    image[side // 2 - 1 : side // 2 + 2, side // 2 + radius] = 255
    images = tf.constant(np.broadcast_to(image, (600, side, side, 3)))
    output = augment_batch(images, source(600), AugmentSettings(rotation=15.0)).numpy()[..., 0]
    rows, columns = np.mgrid[:side, :side] - side // 2
    weight = output.astype(float)
    angles = np.degrees(
        np.arctan2(-(weight * rows).sum(axis=(1, 2)), (weight * columns).sum(axis=(1, 2)))
    )
    assert -16 < angles.min() < -14
    assert 14 < angles.max() < 16
    # The standard error of the mean of a uniform distribution over 30 degrees is 0.35 here.
    assert abs(angles.mean()) < 4 * 0.354
    assert within_four_sigma(np.abs(angles) < 7.5, 0.5)


def test_every_rule_runs_as_often_and_as_strongly_as_it_says(monkeypatch) -> None:
    """Operations that note their parameters instead of changing images."""
    draws = 50_000
    noted: dict[str, list[np.ndarray]] = {}
    real = autoaugment._operations

    def noting(name: str):
        def apply(images: tf.Tensor, parameters: tf.Tensor) -> tf.Tensor:
            noted.setdefault(name, []).append(parameters.numpy())
            return images

        return apply

    def operations(height: int, width: int):
        return {
            name: operation._replace(apply=noting(name))
            for name, operation in real(height, width).items()
        }

    monkeypatch.setattr(autoaugment, "_operations", operations)
    autoaugment.apply_policy(
        tf.zeros([draws, 2, 2, 3], tf.uint8), source(draws), "autoaugment_cifar"
    )

    rules = [rule for pair in AUTOAUGMENT_CIFAR for rule in pair]
    for name in {name for name, _, _ in rules}:
        expected = sum(probability for other, probability, _ in rules if other == name) / 25
        runs = sum(len(parameters) for parameters in noted[name])
        assert abs(runs / draws - expected) < 4 * np.sqrt(expected / draws), name
    sharpness = np.concatenate(noted["sharpness"])
    steps = np.array([1, 3, 5, 6, 9]) / 10  # magnitude indices 1, 3, 5, 6 and 9 of 0..0.9
    np.testing.assert_allclose(
        np.unique(sharpness), np.sort([*(1 - steps), *(1 + steps)]), atol=1e-6
    )
    assert within_four_sigma(sharpness > 1, 0.5)
    rotations = np.concatenate(noted["rotate"])
    np.testing.assert_allclose(np.unique(rotations), [2 * 30 / 9], atol=1e-5)  # never negative


# The policy as it is published: operation, probability in tenths, magnitude index.
PUBLISHED = """
invert 1 7 contrast 2 6; rotate 7 2 translate_x 3 9; sharpness 8 1 sharpness 9 3;
shear_y 5 8 translate_y 7 9; autocontrast 5 8 equalize 9 2; shear_y 2 7 posterize 3 7;
color 4 3 brightness 6 7; sharpness 3 9 brightness 7 9; equalize 6 5 equalize 5 1;
contrast 6 7 sharpness 6 5; color 7 7 translate_x 5 8; equalize 3 7 autocontrast 4 8;
translate_y 4 3 sharpness 2 6; brightness 9 6 color 2 8; solarize 5 2 invert 0 3;
equalize 2 0 autocontrast 6 0; equalize 2 8 equalize 6 4; color 9 9 equalize 6 6;
autocontrast 8 4 solarize 2 8; brightness 1 3 color 7 0; solarize 4 5 autocontrast 9 3;
translate_y 9 9 translate_y 7 9; autocontrast 9 2 solarize 8 3; equalize 8 8 invert 1 3;
translate_y 7 9 autocontrast 9 1
"""


def test_the_policy_is_the_published_one() -> None:
    pairs = []
    for text in PUBLISHED.split(";"):
        words = text.split()
        rules = [words[:3], words[3:]]
        pairs.append(tuple((name, int(tenths) / 10, int(index)) for name, tenths, index in rules))
    assert tuple(pairs) == AUTOAUGMENT_CIFAR


def test_every_pair_is_equally_likely() -> None:
    chosen = source(50_000).uniform("pair", 0, 25, tf.int32).numpy()
    assert len(AUTOAUGMENT_CIFAR) == 25
    assert all(within_four_sigma(chosen == pair, 1 / 25) for pair in range(25))


def test_magnitudes_are_the_published_ones() -> None:
    operations = autoaugment._operations(32, 32)
    expected = {
        "shear_y": 8 / 9 * 0.3,
        "translate_x": 8 / 9 * 150 / 331 * 32,
        "color": 8 / 9 * 0.9,
        "posterize": 4,
        "rotate": 8 / 9 * 30,
    }
    for name, strength in expected.items():
        assert operations[name].strengths[8] == pytest.approx(strength), name
    solarize = operations["solarize"]
    assert solarize.origin + solarize.strengths[2] == pytest.approx(256 * 7 / 9)
    assert [operations["posterize"].strengths[i] for i in range(10)] == [
        8,
        8,
        7,
        7,
        6,
        6,
        5,
        5,
        4,
        4,
    ]


def test_color_jitter_draws_factors_and_orders_evenly() -> None:
    draws = draw_changes(source(20_000), AugmentSettings(color_jitter=(0.4, 0.2, 0.0)))
    assert set(draws) == {"jitter"}
    factors, order = (x.numpy() for x in draws["jitter"])
    for i, strength in enumerate((0.4, 0.2)):
        deviation = factors[:, i] - 1
        assert -strength <= deviation.min() < -0.99 * strength
        assert 0.99 * strength < deviation.max() <= strength
        assert within_four_sigma(deviation < 0, 0.5)
        assert within_four_sigma(np.abs(deviation) < strength / 2, 0.5)
    assert (factors[:, 2] == 1).all()
    codes = order @ [9, 3, 1]
    assert all(within_four_sigma(codes == code, 1 / 6) for code in np.unique(codes))
    assert len(np.unique(codes)) == 6 and (np.sort(order, axis=1) == [0, 1, 2]).all()
    np.testing.assert_allclose(np.corrcoef(factors[:, 0], factors[:, 1])[0, 1], 0, atol=0.03)


@pytest.mark.slow
@pytest.mark.integration
def test_packed_images_come_back_packed_and_are_changed_alike() -> None:
    images = noise(12)
    for settings in (EVERYTHING, PHOTOS, AugmentSettings(crop_padding=2), AugmentSettings()):
        output = augment_batch(packed_ops.pack(images), source(12), settings)
        assert output.dtype == tf.uint32
        expected = augment_batch(images, source(12), settings)
        np.testing.assert_array_equal(packed_ops.unpack(output), expected)


@pytest.mark.integration
def test_what_is_done_image_by_image_can_be_done_before_the_rest() -> None:
    settings = AugmentSettings(
        color_jitter=(0.4, 0.4, 0.4), policy="randaugment", fill=(1, 2, 3), cutout=4
    )
    rest, only = settings.split_per_image_ops()
    assert rest == AugmentSettings(fill=(1, 2, 3), cutout=4)
    images = augment_batch(augment_batch(noise(12), source(12), only), source(12), rest)
    np.testing.assert_array_equal(images, augment_batch(noise(12), source(12), settings))


def test_normalizes_packed_images_alike() -> None:
    statistics = (0.5, 0.2, 0.0), (0.25, 0.5, 2.0)
    output = normalize(packed_ops.pack(noise(3)), *statistics)
    np.testing.assert_allclose(output, normalize(noise(3), *statistics), atol=1e-6)


def test_normalizes_by_channel() -> None:
    images = tf.constant([[[[0, 51, 255]]]], tf.uint8)
    output = normalize(images, (0.5, 0.2, 0.0), (0.25, 0.5, 2.0)).numpy()
    np.testing.assert_allclose(output[0, 0, 0], [-2.0, 0.0, 0.5], atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "trivial"}, "one of none, autoaugment_cifar, randaugment; got 'trivial'"),
        ({"color_jitter": (0.4, 0.4)}, "color_jitter must be"),
        ({"color_jitter": (0.4, 0.4, 1.2)}, "color_jitter must be"),
        ({"fill": (0, 0, 256)}, "fill must be"),
        ({"rotation": -1.0}, "rotation"),
        ({"rotation": float("nan")}, "rotation"),
        ({"crop_padding": -1}, "crop_padding"),
        ({"cutout": 3}, "cutout must be even"),
    ],
)
def test_refuses_what_is_not_valid(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AugmentSettings(**settings)


def test_seeds_fold_in_their_step() -> None:
    seeds = {tuple(fold_in(tf.constant([0, 0]), step).numpy()) for step in range(100)}
    assert len(seeds) == 100
