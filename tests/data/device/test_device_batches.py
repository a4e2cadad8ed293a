# SPDX-License-Identifier: Apache-2.0
"""Orders, mixing and batches of the device pipeline, against its plans and against the host's."""

import itertools
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow as tf
from jax.extend.core import jaxprs_in_params
from scipy import stats

from balpoe_jax.config import resolve
from balpoe_jax.data import pipeline
from balpoe_jax.data.batches import mixing as host_mixing
from balpoe_jax.data.device.batches import make_batch
from balpoe_jax.data.device.mixing import Mixer
from balpoe_jax.data.device.orders import Order, WeightedSampler
from balpoe_jax.data.device.packing import pack, pack_on_host
from balpoe_jax.data.device.plans import OTHERS, Planner
from balpoe_jax.data.device.randomness import generator
from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.data.settings import (
    RULES,
    AugmentSettings,
    MixSettings,
    TrainSettings,
    steps_per_epoch,
)
from balpoe_jax.data.tracing import no_autograph
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.experiment.inputs import DeviceInputs, map_planned_step
from balpoe_jax.experiment.settings import train_settings
from balpoe_jax.methods import PRESETS
from balpoe_jax.parallel import AXIS_NAME, make_parallel
from balpoe_jax.step import TrainState
from tests.helpers.config_files import get_config

COUNTS = np.array([30, 12, 5, 2])
LABELS = np.repeat(np.arange(4), COUNTS)
SHAPE = (8, 6, 3)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
BATCH = 16
MOVED = AugmentSettings(crop_padding=2, flip=True, rotation=15.0)


@cache
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (len(LABELS), *SHAPE)).astype(np.uint8)


def settings_of(**changes: Any) -> TrainSettings:
    fields: dict[str, Any] = {"batch_size": BATCH, "seed": 3, "mean": MEAN, "std": STD}
    return TrainSettings(**{**fields, "augment": MOVED, **changes})


def planner_of(**changes: Any) -> Planner:
    return Planner(LABELS, SHAPE, settings_of(**changes))


def made(planner: Planner, step: int) -> TrainBatch:
    constants = {"images": pack_on_host(images()), "tables": planner.tables()}
    batch = jax.jit(partial(make_batch, planner=planner))(constants, planner.step(step))
    return jax.device_get(batch)


def normalized(pixels: np.ndarray) -> np.ndarray:
    return ((pixels / 255.0 - MEAN) / STD).astype(np.float32)


def test_images_are_packed_alike_by_both() -> None:
    np.testing.assert_array_equal(pack_on_host(images()), pack(images()))


# Orders


def test_an_epoch_is_a_permutation_that_wraps_at_its_end() -> None:
    order, per_epoch = Order(LABELS, settings_of()), steps_per_epoch(len(LABELS), BATCH)
    epochs = [
        np.concatenate([order.positions(epoch * per_epoch + i) for i in range(per_epoch)])
        for epoch in range(3)
    ]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch[: len(LABELS)]), np.arange(len(LABELS)))
        np.testing.assert_array_equal(
            epoch[len(LABELS) :], epoch[: per_epoch * BATCH - len(LABELS)]
        )
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(Order(LABELS, settings_of()).positions(7), order.positions(7))
    assert (Order(LABELS, settings_of(seed=4)).positions(7) != order.positions(7)).any()


def test_balanced_batches_draw_every_class_and_its_examples_evenly() -> None:
    order = Order(LABELS, settings_of(batch_size=1000, sampler="class_balanced"))
    drawn = np.concatenate([order.positions(step) for step in range(40)])
    counts = np.bincount(drawn, minlength=len(LABELS))
    expected = 40_000 / 4 / COUNTS[LABELS]
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_draws_follow_a_power_of_the_class_sizes() -> None:
    drawn = WeightedSampler(LABELS, -1.0).draw(generator(0, "test", 0), 40_000)
    weights = 1 / COUNTS
    expected = 40_000 * weights / weights.sum()
    assert stats.chisquare(np.bincount(LABELS[drawn]), expected).pvalue > 1e-4


@pytest.mark.parametrize("run", [1, 3])
def test_class_aware_epochs_give_every_class_its_turn(run: int) -> None:
    """As of the host's: classes in turn, and of each all examples before any comes again."""
    order = Order(LABELS, settings_of(batch_size=12, sampler="class_aware", samples_per_class=run))
    epoch = np.concatenate([order.positions(step) for step in range(5)])[: 60 // run * run]
    turns = LABELS[epoch].reshape(-1, run)
    assert (turns == turns[:, :1]).all()
    whole = turns[: len(turns) // 4 * 4, 0].reshape(-1, 4)
    assert (np.sort(whole, axis=1) == np.arange(4)).all()
    assert len(np.unique(whole, axis=0)) > 1
    for label, count in enumerate(COUNTS):
        seen = epoch[LABELS[epoch] == label]
        for start in range(0, len(seen) - count, count):
            assert len(set(seen[start : start + count])) == count


# Batches


def test_a_batch_is_what_its_plan_says() -> None:
    """A crop, a flip and mixup made pixel by pixel; what views do has tests of its own."""
    planner = planner_of(augment=AugmentSettings(), mix=MixSettings(alpha=0.4))
    plan, batch = planner.step(5), made(planner, 5)
    pixels = normalized(images()[plan["index"]])
    share = plan["mix"]["share"][:, None, None, None]
    expected = share * pixels + (1 - share) * pixels[plan["mix"]["partner"]]
    np.testing.assert_allclose(batch.images, expected, atol=2e-6)
    np.testing.assert_array_equal(batch.labels, LABELS[plan["index"]])
    np.testing.assert_array_equal(batch.other_labels, batch.labels[plan["mix"]["partner"]])
    np.testing.assert_array_equal(batch.mix_weight, plan["mix"]["share"])
    assert 0 < batch.mix_weight[0] < 1
    dtypes = jax.tree.map(lambda x: x.dtype.name, batch)
    assert dtypes == TrainBatch(("float32",), "int32", "int32", "float32")


@pytest.mark.parametrize("rule", RULES)
def test_mixed_pixels_and_shares_belong_together(rule: str) -> None:
    """By constant images, whose mixture tells each pixel's share."""
    planner = planner_of(
        augment=AugmentSettings(), mix=MixSettings(alpha=1.0, rule=rule, sampling_power=-1.0)
    )
    for step in range(6):
        plan = planner.step(step)
        mix, rows = plan["mix"], np.arange(BATCH)
        own = images()[plan["index"]]
        others = images()[mix["partner"]] if OTHERS in planner.views else own[mix["partner"]]
        shares = np.broadcast_to(mix["share"][:, None, None, None], (*own.shape[:3], 1)).copy()
        for row, (top, bottom, left, right) in zip(rows, mix.get("box", []), strict=False):
            shares[row, top:bottom, left:right] = 0
        expected = shares * normalized(own) + (1 - shares) * normalized(others)
        batch = made(planner, step)
        np.testing.assert_allclose(batch.images, expected, atol=2e-6)
        other_labels = LABELS[mix["partner"]]
        if OTHERS not in planner.views:
            other_labels = batch.labels[mix["partner"]]
        np.testing.assert_array_equal(batch.other_labels, other_labels)
        area = shares.mean(axis=(1, 2, 3))
        if rule not in ("remix", "remix_cutmix"):
            np.testing.assert_allclose(batch.mix_weight, area, atol=1e-6)
            continue
        counts, other_counts = COUNTS[batch.labels], COUNTS[batch.other_labels]
        rarer = (other_counts * 3 <= counts) & (area < 0.5)
        rarer_self = (counts * 3 <= other_counts) & (1 - area < 0.5)
        by_hand = np.where(rarer, 0, np.where(rarer_self, 1, area))
        np.testing.assert_allclose(batch.mix_weight, by_hand, atol=1e-6)


@pytest.mark.parametrize("partners", ["batch", "sampler"])
def test_two_views_are_mixed_by_one_coefficient_with_the_same_partners(partners: str) -> None:
    """The first as a whole, the second in a box; a third one is not mixed."""
    mix = MixSettings(alpha=1.0, rule="mixup_and_cutmix", partners=partners)
    # The views of a partner of the sampler are known where nothing moves them.
    how = AugmentSettings() if partners == "sampler" else MOVED
    planner = planner_of(augment=how, views=(how, how), mix=mix)
    unmixed = planner_of(augment=how, views=(how, how))
    areas = []
    for step in range(4):
        plan, batch, before = planner.step(step), made(planner, step), made(unmixed, step).views
        partner = plan["mix"]["partner"]
        if partners == "sampler":
            positions, others = partner, [normalized(images()[partner])] * 2
        else:
            positions, others = plan["index"][partner], [view[partner] for view in before]
        share = plan["mix"]["share"][:, None, None, None]
        expected = share * before[0] + (1 - share) * others[0]
        np.testing.assert_allclose(batch.views[0], expected, atol=2e-6)
        inside = np.zeros((BATCH, *SHAPE[:2], 1), bool)
        for row, (top, bottom, left, right) in enumerate(plan["mix"]["second_box"]):
            inside[row, top:bottom, left:right] = True
        expected = np.where(inside, others[1], before[1])
        np.testing.assert_allclose(batch.views[1], expected, atol=2e-6)
        np.testing.assert_array_equal(batch.views[2], before[2])
        np.testing.assert_array_equal(batch.other_labels, LABELS[positions])
        np.testing.assert_array_equal(batch.mix_weight, plan["mix"]["share"])
        assert (inside.mean(axis=(1, 2, 3)) <= 1 - batch.mix_weight + 1e-6).all()
        areas.append(inside[0].mean())
    assert len(set(areas)) > 1


def test_mixing_begins_and_ends_at_its_epochs_and_by_its_probability() -> None:
    per_epoch = steps_per_epoch(len(LABELS), BATCH)
    mix = MixSettings(alpha=0.4, first_epoch=1, last_epoch=2)
    mixed = [(planner_of(mix=mix).step(k)["weight"] < 1).all() for k in range(4 * per_epoch)]
    assert mixed == [per_epoch <= k < 2 * per_epoch for k in range(4 * per_epoch)]
    half = Mixer(LABELS, SHAPE, settings_of(mix=MixSettings(alpha=0.4, probability=0.3)))
    labels = LABELS[:BATCH].astype(np.int32)
    share = np.mean([half.draw(k, labels)[1]["weight"][0] < 1 for k in range(600)])
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / 600)
    pixels, unmixed = Mixer(LABELS, SHAPE, settings_of(mix=mix)).draw(0, labels)
    assert (pixels["share"] == 1).all()
    np.testing.assert_array_equal(unmixed["other_labels"], labels)


def test_partners_stay_in_their_groups() -> None:
    mixer = Mixer(LABELS, SHAPE, settings_of(mix=MixSettings(alpha=0.4, groups=4)))
    partner = mixer.draw(2, LABELS[:BATCH].astype(np.int32))[0]["partner"].reshape(4, 4)
    np.testing.assert_array_equal(np.sort(partner, axis=1), np.arange(16).reshape(4, 4))


@pytest.mark.integration
@pytest.mark.parametrize(("alpha", "rule"), [(0.4, "mixup"), (0.4, "unimix"), (1.0, "cutmix")])
def test_both_pipelines_mix_by_one_distribution(alpha: float, rule: str) -> None:
    settings = settings_of(mix=MixSettings(alpha=alpha, rule=rule, sampling_power=-1.0))
    ours = Mixer(LABELS, SHAPE, settings)
    theirs = host_mixing.Mixer(settings.mix, LABELS, SHAPE, BATCH, 3, slice(0, BATCH))
    labels = LABELS[:: len(LABELS) // BATCH][:BATCH].astype(np.int32)
    drawn = [ours.draw(step, labels)[1] for step in range(400)]

    def draw(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return theirs.draw(step, tf.constant(labels))[1]

    host = list(tf.data.Dataset.range(400).map(no_autograph(draw)).as_numpy_iterator())
    weights, partners = zip(*((x["weight"][3], x["other_labels"][3]) for x in drawn), strict=True)
    host_partners, host_weights = zip(*((x[0][3], x[1][3]) for x in host), strict=True)
    assert stats.ks_2samp(weights, host_weights).pvalue > 1e-4
    table = [
        np.bincount(each.astype(int), minlength=4)
        for each in map(np.array, (partners, host_partners))
    ]
    assert stats.chi2_contingency(np.array(table) + 1).pvalue > 1e-4


@pytest.mark.integration
def test_both_pipelines_make_one_distribution_of_images() -> None:
    """Mean and spread of every pixel over many draws of one image, within the error of the mean."""
    source = ArraySource(images()[:1], np.zeros(1, np.int64), np.zeros(1, np.int64))
    settings = settings_of(batch_size=500)
    planner = Planner(source.labels, SHAPE, settings)
    constants = {"images": source.images, "tables": planner.tables()}
    make = jax.jit(partial(make_batch, planner=planner))
    ours = np.concatenate([make(constants, planner.step(k)).images for k in range(4)])
    host = pipeline.train_batches(source, settings, 0, 4)
    theirs = np.concatenate([batch.images for batch in host])
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / len(ours))
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * error).all()
    spread = ours.std(axis=0) / theirs.std(axis=0)
    assert ((spread > 0.85) & (spread < 1.15)).all()


# Steps that are made together, and devices that share a batch


def collect(mode: str, devices: int, dispatches: list[tuple[int, int]], **changes: Any):
    """The batches that a step gets, in the order of the global batch, one for each step."""
    data = ArraySource(images(), LABELS.astype(np.int64), np.arange(len(LABELS)))
    parallel = make_parallel(mode, jax.devices()[:devices])
    steps = dispatches[0][1] - dispatches[0][0]
    settings = settings_of(**changes)
    inputs = DeviceInputs(parallel, data, (settings,), AugmentSettings(), 3, steps)

    def step(state: TrainState, batch: TrainBatch, constants: dict):
        gather = partial(jax.lax.all_gather, axis_name=AXIS_NAME, tiled=True, to="invarying")
        metrics = {"loss": state.step, "batch": jax.tree.map(gather, batch)}
        return state.replace(step=state.step + 1), metrics

    mapped = inputs.map_train_step(step, 0)
    state = parallel.replicate(TrainState(np.zeros((), np.int32), {}, {}, {}))
    for placed in inputs.train(0, dispatches):
        state, metrics = mapped(state, placed)
        yield from _steps(jax.device_get(metrics))


def _steps(metrics: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if metrics["loss"].ndim == 0:
        yield metrics
        return
    for k in range(len(metrics["loss"])):
        yield jax.tree.map(lambda x: x[k], metrics)  # noqa: B023


CMO = MixSettings(alpha=1.0, rule="cmo", sampling_power=-1.0)


@pytest.mark.integration
@pytest.mark.parametrize("mix", [MixSettings(alpha=0.4), CMO], ids=["mixup", "cmo"])
def test_any_number_of_steps_and_devices_makes_the_same_batches(mix: MixSettings) -> None:
    changes = {"mix": mix, "views": (AugmentSettings(crop_padding=1),)}
    singly = list(collect("shard_map", 1, [(k, k + 1) for k in range(5)], **changes))
    others = [
        ("pmap", 1, [(0, 5)]),
        ("shard_map", 1, [(0, 3), (3, 5)]),
        ("pmap", 4, [(0, 4), (4, 5)]),
        ("shard_map", 4, [(k, k + 1) for k in range(5)]),
    ]
    for mode, devices, dispatches in others:
        batches = list(collect(mode, devices, dispatches, **changes))
        assert len(batches) == 5
        for one, other in zip(singly, batches, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)
    first, second = (metrics["batch"] for metrics in singly[:2])
    assert isinstance(first, TrainBatch) and len(first.views) == 2
    assert (first.images != second.images).any()


@pytest.mark.slow
@pytest.mark.integration
def test_every_recipe_of_images_in_memory_has_its_batches() -> None:
    """Of all methods on CIFAR and digits; of the views the shapes alone, which tracing tells."""
    planned, traced = set(), set()
    for name, recipe, method in itertools.product(
        ("cifar100_lt", "digits_lt"), ("own", "standard", "strong", "long"), PRESETS
    ):
        if name == "digits_lt" and recipe in ("strong", "long"):
            continue
        config = get_config(name, f"recipe={recipe},method={method}")
        for settings in train_settings(resolve(config)):
            if settings in planned:
                continue
            planned.add(settings)
            planner = Planner(LABELS, (32, 32, 3), settings)
            plan = planner.step(0)
            assert {len(x) for x in jax.tree.leaves(plan)} == {settings.batch_size}
            first = (settings.augment, settings.other_augment)
            rest = {f"images_{i}": (augment,) for i, augment in enumerate(settings.views, 2)}
            for key, view in planner.views.items():
                how = rest.get(key, first)
                if how not in traced:
                    traced.add(how)
                    made = jax.eval_shape(
                        view.augment,
                        np.zeros((49, 32, 32, 3), np.uint8),
                        plan["index"],
                        plan["views"][key],
                        planner.tables()[key],
                    )
                    assert made.shape == (settings.batch_size, 32, 32, 3)
                    assert made.dtype == np.uint8
    assert len(planned) > 15


@pytest.mark.integration
@pytest.mark.parametrize(
    "changes",
    [
        {"augment": AugmentSettings(policy="autoaugment_cifar")},
        {"augment": AugmentSettings(policy="randaugment")},
        {
            "augment": AugmentSettings(color_jitter=(0.4, 0.4, 0.4), hue=0.1, blur=0.5),
            "other_augment": AugmentSettings(policy="randaugment"),
        },
    ],
    ids=["autoaugment", "randaugment", "either"],
)
@pytest.mark.slow_cases("pmap-autoaugment", "pmap-randaugment", "pmap-either")
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_no_table_is_copied_for_each_image(mode: str, changes: dict[str, Any]) -> None:
    """The largest table has 2**24 bytes, and an accelerator works on all images at once."""
    planner = planner_of(**changes)
    parallel = make_parallel(mode, jax.devices()[:2])
    step = lambda state, batch, constants: (state, {})  # noqa: E731
    mapped = map_planned_step(parallel, step, planner, scanned=False)
    of_batches = {"images": pack_on_host(images()), "tables": planner.tables()}
    plan = jax.eval_shape(parallel.shard, planner.step(0))
    traced = jax.make_jaxpr(mapped)(np.zeros((), np.int32), plan, of_batches, {})
    assert 1000 < max(_sizes(traced.jaxpr)) <= 2**24


def _sizes(jaxpr: Any) -> Iterator[int]:
    """Of all that a program computes and hands on, in elements."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _sizes(inner)
