# SPDX-License-Identifier: Apache-2.0
"""Contrastive views: their operations against Pillow, their draws, and the batches they come in."""

import dataclasses

import jax
import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.config import default_config, resolve
from balpoe_jax.data.images import packed_ops
from balpoe_jax.data.images.augment import augment_batch, draw_changes
from balpoe_jax.data.images.blur import blur, box_weights
from balpoe_jax.data.images.color_jitter import change_hue, color_jitter
from balpoe_jax.data.images.resize import enlarge_windows
from balpoe_jax.data.images.views import View, make_view
from balpoe_jax.data.pipeline import eval_batches, train_batches, view_batches
from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.data.settings import BLUR_SIGMA, AugmentSettings, Host
from balpoe_jax.data.types import EvalBatch
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.settings import train_settings
from balpoe_jax.methods import PRESETS
from tests.helpers.augmentations import SIM, UNIMIX
from tests.helpers.batches import PLAIN, assert_equal, make_settings, make_source
from tests.helpers.config_files import get_config
from tests.helpers.draws import noise, source, windows_by_hand, within_four_sigma
from tests.helpers.pillow import view_fixtures as fixtures


def packed(image: np.ndarray) -> tf.Tensor:
    return packed_ops.pack(tf.constant(image))


def test_hue_equals_pillow_to_the_bit() -> None:
    colours = packed(fixtures()["colours"])
    for hue, expected in zip(fixtures()["hues"], fixtures()["turned"], strict=True):
        output = packed_ops.unpack(change_hue(colours, tf.constant(hue)))
        np.testing.assert_array_equal(output, expected, f"{hue}")


def test_blur_equals_pillow_to_the_bit() -> None:
    for sigma, outputs in zip(fixtures()["sigmas"], fixtures()["blurred"], strict=True):
        for image, expected in zip(fixtures()["images"], outputs, strict=True):
            output = packed_ops.unpack(blur(packed(image), box_weights(tf.constant(sigma))))
            np.testing.assert_array_equal(output, expected, f"{sigma}")


def test_a_blur_has_the_deviation_that_it_is_called_by() -> None:
    """What a point becomes: mean square distances along each axis are the variance."""
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    for sigma in (0.5, 1.2, 2.0, 2.4):
        weights = box_weights(tf.constant(sigma, tf.float32)).numpy() / 2**24
        assert abs(weights @ [1, 2, 2] - 1) < 1e-6
        # Of three passes of boxes.
        assert abs(3 * (weights @ [0, 2, 8]) - sigma**2) < 1e-4
    output = packed_ops.unpack(blur(packed(image), box_weights(tf.constant(2.0)))).numpy()[..., 0]
    np.testing.assert_array_equal(output, output[::-1])
    np.testing.assert_array_equal(output, output[:, ::-1])


def test_windows_are_enlarged_as_pillow_does_to_the_bit() -> None:
    images = fixtures()["images"]
    for window, expected in zip(fixtures()["windows"], fixtures()["cropped"], strict=True):
        windows = tf.constant(np.tile(window, (len(images), 1)))
        np.testing.assert_array_equal(enlarge_windows(tf.constant(images), windows), expected)


def test_jitter_with_hue_equals_pillow_to_the_bit() -> None:
    names = ("jitter_factors", "jitter_orders", "jittered")
    for factors, order, outputs in zip(*(fixtures()[name] for name in names), strict=True):
        for image, expected in zip(fixtures()["images"], outputs, strict=True):
            output = color_jitter(packed(image), tf.constant(factors), tf.constant(order))
            np.testing.assert_array_equal(packed_ops.unpack(output), expected)


def test_without_colour_an_image_is_pillows_grey_one() -> None:
    images = tf.constant(fixtures()["images"])
    output = augment_batch(images, source(2), AugmentSettings(grayscale=1.0))
    np.testing.assert_array_equal(output, fixtures()["grey"])


def test_views_are_drawn_as_often_and_as_strongly_as_they_say() -> None:
    draws = draw_changes(source(20_000), SIM)
    assert set(draws) == {"jitter", "jittered", "grayscale", "blurred", "blur"}
    for name, probability in (("jittered", 0.8), ("grayscale", 0.2), ("blurred", 0.5)):
        assert within_four_sigma(draws[name].numpy(), probability), name
    factors, order = (x.numpy() for x in draws["jitter"])
    for i, (middle, reach) in enumerate([(1, 0.4)] * 3 + [(0, 0.1)]):
        deviation = factors[:, i] - middle
        assert -reach <= deviation.min() < -0.99 * reach and 0.99 * reach < deviation.max() <= reach
        assert within_four_sigma(np.abs(deviation) < reach / 2, 0.5)
    codes, counts = np.unique(order @ [64, 16, 4, 1], return_counts=True)
    assert len(codes) == 24 and ((counts - 833) ** 2 / 833).sum() < 49.7  # 99.9 %, 23 degrees
    low, high = BLUR_SIGMA
    half = box_weights(tf.constant((low + high) / 2)).numpy()[0]
    assert within_four_sigma(draws["blur"].numpy()[:, 0] < half, 0.5)
    assert box_weights(tf.constant([low, high])).numpy()[::-1, 0].tolist() == pytest.approx(
        [draws["blur"].numpy()[:, 0].min(), draws["blur"].numpy()[:, 0].max()], rel=1e-3
    )


def test_a_window_of_a_small_image_follows_the_rule_of_the_random_resized_crop() -> None:
    images, random = noise(64, 12), source(64)
    output = augment_batch(images, random, AugmentSettings(crop_area=0.2))
    draws = random.stream("move").stream("window")
    windows = windows_by_hand(
        np.full((64, 2), 12),
        draws.uniform("area", 0.2, 1.0, tf.float64, (10,)).numpy(),
        draws.uniform("ratio", np.log(3 / 4), np.log(4 / 3), tf.float64, (10,)).numpy(),
        draws.uniform("position", 0, 1, tf.float64, (2,)).numpy(),
    )
    assert 0.15 < (windows[:, 2] * windows[:, 3]).min() / 144 < 0.35
    expected = enlarge_windows(images, tf.constant(windows, tf.int32))
    np.testing.assert_array_equal(output, expected)


@pytest.mark.slow
@pytest.mark.integration
def test_the_stages_of_a_view_come_in_their_order() -> None:
    """Window, flip, jitter, grey, blur, and then a policy."""
    images, random = noise(16), source(16)
    changes = ("color_jitter", "hue", "jitter_probability", "grayscale", "blur")
    none = AugmentSettings()
    for policy in ("randaugment", "autoaugment_cifar"):
        whole = augment_batch(images, random, dataclasses.replace(SIM, policy=policy))
        moved = AugmentSettings(crop_area=SIM.crop_area, flip=True)
        jittered = AugmentSettings(**{name: getattr(SIM, name) for name in changes[:3]})
        parts = [moved, jittered]
        parts += [AugmentSettings(grayscale=SIM.grayscale), AugmentSettings(blur=SIM.blur)]
        output = images
        for part in (*parts, AugmentSettings(policy=policy)):
            output = augment_batch(output, random, part)
        np.testing.assert_array_equal(output, whole)
    rest, only = SIM.split_per_image_ops()
    assert rest == dataclasses.replace(SIM, **{name: getattr(none, name) for name in changes})
    assert only == dataclasses.replace(SIM, crop_area=None, flip=False)


@pytest.mark.integration
def test_views_of_a_batch_are_independent_and_not_mixed() -> None:
    shown = AugmentSettings(crop_padding=1, flip=True)
    windowed = AugmentSettings(crop_area=0.2, flip=True)
    settings = make_settings(augment=shown, mix=UNIMIX, views=(windowed, shown))
    batches = list(train_batches(make_source(), settings, 2, 5))
    plain = make_settings(augment=shown, mix=UNIMIX)
    first = list(train_batches(make_source(), plain, 2, 5))
    for batch, expected in zip(batches, first, strict=True):
        assert_equal([batch._replace(views=batch.views[:1])], [expected])
        assert len(batch.views) == 3
        assert batch.views[1].dtype == np.float32
    unmixed = make_settings(augment=shown, views=(windowed, shown), mix=PLAIN["mix"])
    for batch, alone in zip(batches, train_batches(make_source(), unmixed, 2, 5), strict=True):
        for view, other in zip(batch.views[1:], alone.views[1:], strict=True):
            np.testing.assert_array_equal(view, other)
        # Of the same augmentation, another draw.
        assert (alone.images != alone.views[2]).any(axis=(1, 2, 3)).mean() > 0
    again = list(train_batches(make_source(), settings, 4, 5, Host(1, 2)))
    assert_equal(again, [jax.tree.map(lambda x: x[4:], batches[2])])


NORMALISATION = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def views(batch_size: int, host: Host = Host(), seed: int = 3, epoch: int = 1) -> np.ndarray:  # noqa: B008
    shown = AugmentSettings(crop_area=0.2, flip=True)
    batches = list(
        view_batches(make_source(), batch_size, *NORMALISATION, shown, seed, epoch, host)
    )
    assert all(isinstance(batch, EvalBatch) for batch in batches)
    return np.concatenate([batch.images[batch.mask] for batch in batches])


@pytest.mark.slow
@pytest.mark.integration
def test_views_for_evaluation_are_a_function_of_the_position() -> None:
    whole = views(21)
    np.testing.assert_array_equal(views(8), whole)
    halves = [views(12, Host(i, 2)) for i in range(2)]
    order = np.concatenate([np.r_[0:6, 12:18], np.r_[6:12, 18:21]])
    np.testing.assert_array_equal(np.concatenate(halves), whole[order])
    for other in (views(21, epoch=2), views(21, seed=4)):
        assert (other != whole).any(axis=(1, 2, 3)).mean() > 0.9


def test_views_for_evaluation_without_augmentation_are_the_examples() -> None:
    given = make_source(), 8, *NORMALISATION
    assert_equal(list(view_batches(*given, AugmentSettings(), 3, 0)), list(eval_batches(*given)))


@pytest.mark.slow
@pytest.mark.integration
def test_each_image_is_augmented_in_one_of_two_ways() -> None:
    """With even odds; the ways are those of batches that are augmented in one way alone."""
    images, random = noise(100), source(100)
    one, other = AugmentSettings(crop_padding=2, flip=True), SIM
    array = ArraySource(images.numpy(), np.zeros(100, int), np.arange(100))
    view = make_view(array, one, other)
    output = view.augment(images, random).numpy()
    first = augment_batch(images, random, one).numpy()
    second = augment_batch(images, random.stream("second"), other).numpy()
    as_first, as_second = ((output == x).all(axis=(1, 2, 3)) for x in (first, second))
    assert (as_first | as_second).all() and within_four_sigma(as_second, 0.5)
    assert isinstance(make_view(array, one), View)


@pytest.mark.slow
@pytest.mark.integration
def test_batches_of_two_ways_are_the_same_on_any_hosts() -> None:
    """And only the first view has two."""
    settings = make_settings(
        augment=AugmentSettings(flip=True),
        other_augment=AugmentSettings(crop_padding=2, cutout=2),
        views=(AugmentSettings(flip=True),),
        mix=PLAIN["mix"],
    )
    batches = list(train_batches(make_source(), settings, 2, 4))
    for i in range(2):
        part = slice(4 * i, 4 * i + 4)
        assert_equal(
            list(train_batches(make_source(), settings, 2, 4, Host(i, 2))),
            jax.tree.map(lambda x: x[part], batches),  # noqa: B023
        )
    one_way = dataclasses.replace(settings, other_augment=None)
    changed = []
    for batch, plain in zip(batches, train_batches(make_source(), one_way, 2, 4), strict=True):
        np.testing.assert_array_equal(batch.views[1], plain.views[1])
        changed += [*(batch.images != plain.images).any(axis=(1, 2, 3))]
    assert 0 < np.mean(changed) < 1


def test_a_config_may_describe_a_second_way() -> None:
    config = get_config("cifar100_lt", "method=cmo_bs,recipe=long")
    settings = train_settings(resolve(config))[0]
    assert settings.augment.policy == "autoaugment_cifar" and settings.augment.cutout == 16
    assert settings.other_augment == SIM
    for recipe in ("own", "strong"):
        config = get_config("cifar100_lt", f"method=cmo_bs,recipe={recipe}")
        assert train_settings(resolve(config))[0].other_augment is None
    photos = get_config("imagenet_lt", "method=cmo_bs,recipe=long")
    other = train_settings(resolve(photos))[0].other_augment
    assert other is not None and (other.policy, other.blur) == ("none", 0.5)
    photos.other_augment.blur = 2.0
    with pytest.raises(
        UserError, match=r"config\.other_augment\.blur must be from 0 to 1, got 2\.0"
    ):
        resolve(photos)


def test_another_methods_training_has_no_second_way(monkeypatch) -> None:
    """Where a method's own one has: it belongs to the augmentation."""
    recipe = PRESETS["cmo_bs"]
    own = {"cifar100_lt": recipe.on["cifar100_lt:recipe=long"]}
    monkeypatch.setitem(PRESETS, "cmo_bs", dataclasses.replace(recipe, on=own))
    for training, has in (("own", True), ("strong", False)):
        config = get_config("cifar100_lt", f"method=cmo_bs,recipe={training}")
        assert (train_settings(resolve(config))[0].other_augment is not None) is has


def test_a_config_describes_its_views() -> None:
    assert train_settings(resolve(default_config()))[0].views == ()
    config = get_config("digits_lt", "method=bcl,recipe=standard")
    config.view3.hue = 0.1
    second, third = train_settings(resolve(config))[0].views
    assert second == train_settings(resolve(config))[0].augment and third.hue == 0.1
    config.view3.blur = 2.0
    with pytest.raises(UserError, match=r"config\.view3\.blur must be from 0 to 1, got 2\.0"):
        resolve(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hue", 0.6),
        ("crop_area", -0.1),
        ("jitter_probability", 1.1),
        ("grayscale", 2.0),
        ("blur", -1.0),
        ("randaugment_magnitude", 11.0),
    ],
)
def test_refuses_what_is_not_valid(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"config\.augment\.{field} must be from"):
        AugmentSettings(**{field: value})


def test_randaugment_has_an_operation_at_least() -> None:
    with pytest.raises(UserError, match=r"layers must be from 1 to 100, got 0"):
        AugmentSettings(randaugment_layers=0)
