# SPDX-License-Identifier: Apache-2.0
"""Mixing rules against plain NumPy twins, on the values that were drawn."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data.batches.mixing import Mixer, box_mask, mix_images, relabel
from balpoe_jax.data.pipeline import train_batches
from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.data.settings import (
    NO_MIXING,
    RULES,
    AugmentSettings,
    Host,
    MixSettings,
    TrainSettings,
)
from balpoe_jax.errors import UserError
from tests.helpers.augmentations import UNIMIX
from tests.helpers.batches import assert_equal, join, make_settings

LABELS = np.repeat([0, 1, 2], [18, 6, 2])  # of 26 examples: ratios 3, 3 and 9
BATCH, SIDE, WIDTH, PER_EPOCH = 8, 7, 9, 4


def make_mixer(batch_size: int = BATCH, **settings) -> Mixer:
    settings = MixSettings(**{"alpha": 1.0, **settings})
    return Mixer(settings, LABELS, (SIDE, WIDTH, 3), batch_size, 5, slice(0, batch_size))


def draws(mixer: Mixer, labels: np.ndarray, steps: int) -> list:
    """What is drawn for the steps, by the same graph: Mix, MixedLabels and partners' labels."""
    dataset = tf.data.Dataset.range(steps).map(lambda step: mixer.draw(step, tf.constant(labels)))
    return list(dataset.as_numpy_iterator())


def batch_labels() -> np.ndarray:
    return np.array([0, 1, 2, 0, 0, 1, 2, 2], np.int32)


def box_by_hand(coefficient: float, row: int, column: int, height: int, width: int) -> np.ndarray:
    ratio = np.sqrt(1 - coefficient)
    cut_height, cut_width = int(height * ratio), int(width * ratio)
    inside = np.zeros((height, width), bool)
    top, bottom = np.clip([row - cut_height // 2, row + cut_height // 2], 0, height)
    left, right = np.clip([column - cut_width // 2, column + cut_width // 2], 0, width)
    inside[top:bottom, left:right] = True
    return inside


def test_partners_of_a_host_are_among_its_own_rows() -> None:
    """And are those that one host would give these rows, within a group for each host."""
    settings, place = MixSettings(alpha=1.0, groups=2), (LABELS, (SIDE, WIDTH, 3), BATCH, 5)
    whole, second = (Mixer(settings, *place, rows) for rows in (slice(0, 8), slice(4, 8)))
    for step in range(4):
        step, labels = tf.constant(step, tf.int64), tf.constant(batch_labels())
        everywhere = whole.draw(step, labels)[0].partners
        np.testing.assert_array_equal(second.draw(step, labels[4:])[0].partners, everywhere[4:] - 4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 12), (1, 3)])
def test_the_box_is_cutmixs(height: int, width: int) -> None:
    random = np.random.default_rng(0)
    for coefficient in [0.0, 1.0, 0.75, *random.uniform(size=40)]:
        row, column = int(random.integers(height)), int(random.integers(width))
        box = box_mask(tf.constant(coefficient, tf.float64), row, column, height, width)
        np.testing.assert_array_equal(box, box_by_hand(coefficient, row, column, height, width))


@pytest.mark.integration
def test_boxes_are_clipped_and_weights_are_what_is_left_of_the_image() -> None:
    clipped = 0
    for mix, labels in draws(make_mixer(rule="cutmix"), batch_labels(), 60):
        box = 1 - mix.share[0, ..., 0]
        assert set(np.unique(box)) <= {0, 1}
        np.testing.assert_allclose(labels.weight, 1 - box.sum() / (SIDE * WIDTH), rtol=1e-6)
        np.testing.assert_array_equal(np.sort(mix.partners), np.arange(BATCH))
        np.testing.assert_array_equal(labels.other_labels, batch_labels()[mix.partners])
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        np.testing.assert_array_equal(box, np.outer(box.any(1), box.any(0)))
        clipped += len(rows) > 0 and (rows[0] == 0 or columns[-1] == WIDTH - 1)
    assert clipped > 10


@pytest.mark.integration
def test_boxes_are_centred_anywhere_and_as_large_as_the_coefficient_says() -> None:
    """Those of mixup and of cutmix come from the same draw of the coefficient."""
    coefficients = [labels.weight[0] for _, labels in draws(make_mixer(), batch_labels(), 200)]
    shares = [
        1 - mix.share[0, ..., 0] for mix, _ in draws(make_mixer(rule="cutmix"), batch_labels(), 200)
    ]
    hits = np.zeros((SIDE, WIDTH))
    for coefficient, box in zip(coefficients, shares, strict=True):
        candidates = [
            (row, column)
            for row in range(SIDE)
            for column in range(WIDTH)
            if np.array_equal(box, box_by_hand(coefficient, row, column, SIDE, WIDTH))
        ]
        assert candidates, coefficient
        if len(candidates) == 1:
            hits[candidates[0]] += 1
    assert (hits > 0).mean() > 0.8


def test_a_mixture_takes_the_box_from_the_partner_and_the_rest_from_the_image() -> None:
    random = np.random.default_rng(0)
    images = random.normal(size=(BATCH, SIDE, WIDTH, 3)).astype(np.float32)
    others = random.normal(size=images.shape).astype(np.float32)
    for mix, _ in draws(make_mixer(rule="cutmix"), batch_labels(), 8):
        inside = mix.share == 0
        in_batch = mix_images(tf.constant(images), None, mix)
        np.testing.assert_array_equal(in_batch, np.where(inside, images[mix.partners], images))
        read = mix_images(tf.constant(images), tf.constant(others), mix)
        np.testing.assert_array_equal(read, np.where(inside, others, images))


def test_a_coefficient_of_one_leaves_images_as_they_are() -> None:
    for row in range(SIDE):
        assert not box_mask(tf.constant(1.0, tf.float64), row, 3, SIDE, WIDTH).numpy().any()


@pytest.mark.integration
def test_either_mixup_or_cutmix_with_even_odds() -> None:
    both = draws(make_mixer(rule="mixup_or_cutmix"), batch_labels(), 400)
    mixup = draws(make_mixer(rule="mixup"), batch_labels(), 400)
    cutmix = draws(make_mixer(rule="cutmix"), batch_labels(), 400)
    cuts = 0
    for (mix, labels), blended, cut in zip(both, mixup, cutmix, strict=True):
        expected = cut if np.array_equal(mix.share, cut[0].share) else blended
        np.testing.assert_array_equal(
            mix.share, np.broadcast_to(expected[0].share, mix.share.shape)
        )
        np.testing.assert_array_equal(labels.weight, expected[1].weight)
        cuts += expected is cut
    assert abs(cuts - 200) < 4 * 10


def remix_by_hand(weight, counts, other_counts, remix_kappa, threshold) -> list[float]:
    weights = []
    for own, other in zip(counts, other_counts, strict=True):
        if own / other >= remix_kappa and weight < threshold:
            weights.append(0.0)
        elif own / other <= 1 / remix_kappa and 1 - weight < threshold:
            weights.append(1.0)
        else:
            weights.append(weight)
    return weights


@pytest.mark.integration
@pytest.mark.parametrize(("rule", "base_rule"), [("remix", "mixup"), ("remix_cutmix", "cutmix")])
def test_remix_gives_the_whole_label_to_a_rare_class_with_enough_of_the_image(
    rule: str, base_rule: str
) -> None:
    base = draws(make_mixer(rule=base_rule), batch_labels(), 100)
    counts = np.bincount(LABELS)
    found = set()
    for (mix, labels), (base_mix, base_labels) in zip(
        draws(make_mixer(rule=rule), batch_labels(), 100), base, strict=True
    ):
        np.testing.assert_array_equal(mix.share, base_mix.share)
        np.testing.assert_array_equal(mix.partners, base_mix.partners)
        np.testing.assert_array_equal(labels.other_labels, base_labels.other_labels)
        weight = base_labels.weight[0]
        own, other = counts[batch_labels()], counts[labels.other_labels]
        expected = remix_by_hand(weight, own, other, 3.0, 0.5)
        np.testing.assert_array_equal(labels.weight, np.array(expected, np.float32))
        found |= {0.0 if w == 0 else 1.0 if w == 1 else 0.5 for w in labels.weight}
    assert found == {0.0, 0.5, 1.0}


@pytest.mark.parametrize(
    ("weight", "expected"),
    # Partners with a third, a ninth, the same, three times, less than three times as many examples.
    [(0.3, [0, 0, 0.3, 0.3, 0.3]), (0.5, [0.5] * 5), (0.7, [0.7, 0.7, 0.7, 1, 0.7])],
)
def test_remix_by_hand(weight: float, expected: list[float]) -> None:
    counts, others = np.array([18.0, 18, 6, 6, 7]), np.array([6.0, 2, 6, 18, 20])
    given = tf.constant(weight, tf.float32), tf.constant(counts), tf.constant(others)
    np.testing.assert_allclose(relabel(*given, 3.0, 0.5), expected, rtol=1e-6)
    for limit in ((3.0, 0.0), (np.inf, 0.5)):
        np.testing.assert_allclose(relabel(*given, *limit), weight, rtol=1e-6)


@pytest.mark.integration
def test_unimix_favours_the_rarer_of_two() -> None:
    """Modulo 1, from Beta draws and counts; for equal counts around 1/2."""
    mixer = make_mixer(rule="unimix", alpha=0.8, sampling_power=-0.5)
    counts = np.bincount(LABELS)
    weights, expected, others = [], [], []
    for step, (mix, labels) in enumerate(draws(mixer, batch_labels(), 500)):
        np.testing.assert_array_equal(mix.share[:, 0, 0, 0], labels.weight)
        np.testing.assert_array_equal(labels.other_labels, batch_labels()[mix.partners])
        if step < 20:
            coefficients = mixer._coefficients(tf.constant(step, tf.int64), (BATCH,)).numpy()
            own, other = counts[batch_labels()], counts[labels.other_labels]
            expected = np.modf(coefficients + other / (own + other))[0]
            np.testing.assert_allclose(labels.weight, expected, atol=1e-6)
        weights.append(labels.weight)
        others.append(labels.other_labels)
    weights, others = np.array(weights), np.array(others)
    assert weights.min() >= 0 and weights.max() < 1
    equal = weights[others == batch_labels()]
    assert abs(equal.mean() - 0.5) < 4 * 0.29 / np.sqrt(equal.size)
    # Common images (18 examples) with rare partners (2) have a tenth most often.
    unequal = weights[(batch_labels() == 0) & (others == 2)]
    density = np.histogram(unequal, bins=5, range=(0, 1))[0]
    assert density.argmax() == 0


def chi_squared(observed: np.ndarray, odds: np.ndarray) -> float:
    expected = observed.sum() * odds / odds.sum()
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.slow_cases("0.0", "1.0")
@pytest.mark.integration
@pytest.mark.parametrize("exponent", [0.0, -0.5, 1.0])
def test_unimix_draws_partners_with_odds_by_image(exponent: float) -> None:
    found = draws(make_mixer(rule="unimix", sampling_power=exponent), batch_labels(), 800)
    partners = np.concatenate([mix.partners for mix, _ in found])
    odds = np.bincount(LABELS)[batch_labels()].astype(float) ** exponent
    observed = np.bincount(partners, minlength=BATCH)
    assert chi_squared(observed, odds) < 24.3  # 99.9 % with 7 degrees


def test_unimix_draws_within_the_groups() -> None:
    for mix, _ in draws(make_mixer(rule="unimix", groups=4), batch_labels(), 30):
        np.testing.assert_array_equal(mix.partners // 2, np.arange(BATCH) // 2)


@pytest.mark.parametrize("rule", ["cmo", "unimix"])
@pytest.mark.parametrize("exponent", [0.0, -1.0])
def test_the_second_sampler_draws_classes_by_their_counts(rule: str, exponent: float) -> None:
    mixer = make_mixer(rule=rule, sampling_power=exponent, partners="sampler")
    positions = np.concatenate(
        list(tf.data.Dataset.range(600).map(mixer.partners_to_read).as_numpy_iterator())
    )
    counts = np.bincount(LABELS)
    odds = (counts ** (exponent - 1))[LABELS]  # within a class evenly
    assert chi_squared(np.bincount(positions, minlength=len(LABELS)), odds) < 52.6  # 25 degrees


def test_batches_are_mixed_in_their_epochs_and_as_often_as_said() -> None:
    mixer = make_mixer(rule="cmo", probability=0.5, first_epoch=3, last_epoch=203)
    mixed = np.array(list(tf.data.Dataset.range(1000).map(mixer.mixes).as_numpy_iterator()))
    per_epoch = -(-len(LABELS) // BATCH)
    inside = slice(3 * per_epoch, 203 * per_epoch)
    assert (
        per_epoch == PER_EPOCH
        and not mixed[: inside.start].any()
        and not mixed[inside.stop :].any()
    )
    assert abs(mixed[inside].mean() - 0.5) < 4 * 0.5 / np.sqrt(mixed[inside].size)
    windowed = make_mixer(rule="cmo", first_epoch=2)
    mixed = np.array(list(tf.data.Dataset.range(20).map(windowed.mixes).as_numpy_iterator()))
    np.testing.assert_array_equal(mixed, np.arange(20) >= 2 * per_epoch)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_that_is_not_mixed_is_its_own(rule: str) -> None:
    """Even the last bit: the share of the others is none."""
    mixer = make_mixer(rule=rule, probability=0.0)
    images = tf.random.stateless_normal([BATCH, SIDE, WIDTH, 3], [1, 2])
    others = tf.zeros_like(images) if rule == "cmo" else None
    read = tf.zeros([BATCH], tf.int32) if rule == "cmo" else None
    mix, labels = mixer.draw(tf.constant(3, tf.int64), tf.constant(batch_labels()), read)
    np.testing.assert_array_equal(labels.weight, 1)
    np.testing.assert_array_equal(labels.other_labels, batch_labels())
    for of_view in filter(None, (mix.of_view(0), mix.of_view(1))):
        np.testing.assert_array_equal(mix_images(images, others, of_view), images)


def test_a_tiny_alpha_draws_a_coefficient() -> None:
    """Both of the gamma variates that it is made of are too small for a float, mostly."""
    found = [labels.weight[0] for _, labels in draws(make_mixer(alpha=1e-4), batch_labels(), 50)]
    assert (np.abs(np.array(found) - 0.5) > 0.49).mean() > 0.9


def imbalanced_source() -> ArraySource:
    images = np.random.default_rng(1).integers(0, 256, (len(LABELS), 4, 4, 3)).astype(np.uint8)
    return ArraySource(images, LABELS, np.arange(len(LABELS)))


def settings(mix: MixSettings, **changes) -> TrainSettings:
    return make_settings(mix=mix, augment=AugmentSettings(crop_padding=1, flip=True), **changes)


CMO = MixSettings(alpha=1.0, rule="cmo", probability=0.5, first_epoch=1)


@pytest.mark.integration
def test_cmo_pastes_images_of_the_second_sampler_with_draws_of_their_own() -> None:
    source, plain = imbalanced_source(), MixSettings()
    batches = list(train_batches(source, settings(CMO), 0, 24))
    unmixed = list(train_batches(source, settings(plain), 0, 24))
    mixer = Mixer(CMO, source.labels, (4, 4, 3), BATCH, 3, slice(0, BATCH))
    mixed = 0
    for step, (batch, before) in enumerate(zip(batches, unmixed, strict=True)):
        np.testing.assert_array_equal(batch.labels, before.labels)
        if not mixer.mixes(tf.constant(step, tf.int64)):
            assert_equal([batch], [before])
            continue
        positions = mixer.partners_to_read(tf.constant(step, tf.int64)).numpy()
        np.testing.assert_array_equal(batch.other_labels, LABELS[positions])
        pasted = (batch.images != before.images).any(axis=(0, 3))
        np.testing.assert_allclose(pasted.mean(), 1 - batch.mix_weight[0], atol=1e-6)
        # Padding is black, everything else is found in the image that was read.
        values = (batch.images[:, pasted] * make_settings().std + make_settings().mean) * 255
        for value, position in zip(np.round(values), positions, strict=True):
            pixels = {(0, 0, 0), *map(tuple, source.images[position].reshape(-1, 3))}
            assert {tuple(pixel) for pixel in value.astype(int)} <= pixels
        mixed += 1
    assert 4 < mixed < 18


TWO_VIEWS = MixSettings(alpha=1.0, rule="mixup_and_cutmix", sampling_power=1.0)


@pytest.mark.integration
@pytest.mark.slow_cases("sampler")
@pytest.mark.parametrize("partners", ["batch", "sampler"])
def test_two_views_are_mixed_by_one_coefficient_with_the_same_partners(partners: str) -> None:
    """The first as a whole, the second in a box; a third one is not mixed."""
    source, moved = imbalanced_source(), AugmentSettings(crop_padding=1, flip=True)
    how = dataclasses.replace(TWO_VIEWS, partners=partners)
    # The second view of a partner of the sampler is known where nothing moves it.
    views = (moved if partners == "batch" else AugmentSettings(), moved)
    batches = list(train_batches(source, settings(how, views=views), 0, 12))
    unmixed = list(train_batches(source, settings(MixSettings(), views=views), 0, 12))
    mixer = Mixer(how, source.labels, (4, 4, 3), BATCH, 3, slice(0, BATCH))
    areas = []
    for step, (batch, before) in enumerate(zip(batches, unmixed, strict=True)):
        step, others = tf.constant(step, tf.int64), before.views
        if partners == "sampler":
            positions = mixer.partners_to_read(step).numpy()
            pixels = source.images[positions] / 255
            others = (None, (pixels - make_settings().mean) / make_settings().std)
            mix, _ = mixer.draw(step, before.labels, tf.constant(LABELS[positions]))
            np.testing.assert_array_equal(batch.other_labels, LABELS[positions])
        else:
            mix, _ = mixer.draw(step, before.labels)
            others = [view[mix.partners] for view in before.views]
            expected = mix.share * before.views[0] + (1 - mix.share) * others[0]
            np.testing.assert_allclose(batch.views[0], expected, atol=1e-6)
            np.testing.assert_array_equal(batch.other_labels, before.labels[mix.partners])
        np.testing.assert_array_equal(batch.mix_weight, np.full(BATCH, mix.share))
        box = mix.second_share == 0
        expected = np.where(box, others[1], before.views[1])
        np.testing.assert_allclose(batch.views[1], expected, atol=1e-5)
        np.testing.assert_array_equal(batch.views[2], before.views[2])
        side = 4 * np.sqrt(1 - mix.share)
        assert np.asarray(box).sum() <= side**2
        areas.append(np.asarray(box).mean())
    assert len(set(areas)) > 2


@pytest.mark.integration
@pytest.mark.slow_cases("mix1")
@pytest.mark.parametrize("mix", [UNIMIX, CMO])
def test_two_hosts_and_a_resumed_run_make_the_same_batches(mix: MixSettings) -> None:
    source = imbalanced_source()
    whole = list(train_batches(source, settings(mix), 3, 8))
    parts = [list(train_batches(source, settings(mix), 6, 8, Host(i, 2))) for i in range(2)]
    assert_equal(join(parts), whole[3:])


def test_partners_of_the_sampler_need_no_groups() -> None:
    dataclasses.replace(CMO, groups=1).check_groups(BATCH, 4)
    NO_MIXING.check_groups(BATCH, 4)
    with pytest.raises(UserError, match="multiple of the number of hosts, 4; got 1"):
        MixSettings(alpha=1.0).check_groups(BATCH, 4)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rule", "puzzle", "one of mixup, cutmix, mixup_or_cutmix, .*; got 'puzzle'"),
        ("partners", "friends", "one of batch, sampler; got 'friends'"),
        ("alpha", -1.0, "alpha must be from 0 to 1000000, got -1"),
        ("alpha", float("nan"), "alpha must be from 0 to 1000000, got nan"),
        ("probability", 1.5, "must be from 0 to 1, got 1.5"),
        ("first_epoch", -1, "must be from 0 to"),
        ("last_epoch", -1, "must be from 1 to 1000000, or None, got -1"),
        ("remix_kappa", 0.5, "remix_kappa must be from 1 to"),
        ("remix_tau", 2.0, "remix_tau must be from 0 to 1"),
    ],
)
def test_refuses_what_is_not_valid(field: str, value, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        MixSettings(**{field: value})


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"None for the end; got 3 and 3"):
        MixSettings(first_epoch=3, last_epoch=3)
