# SPDX-License-Identifier: Apache-2.0
"""SAM's gradient and averages of weights in the step, each against a slow twin in NumPy.

In double precision, so that a wrong factor cannot hide behind rounding.
"""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from balpoe_jax.averages import EpochAverage, MovingAverage
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.methods import Context
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.models import Outputs
from balpoe_jax.optim import make_optimizer
from balpoe_jax.parallel import AXIS_NAME, make_parallel
from balpoe_jax.step import (
    TrainState,
    create_state,
    make_statistics_step,
    make_train_step,
)
from tests.helpers import tiny_network

pytestmark = pytest.mark.usefixtures("x64")

CLASSES, BATCH, PER_EPOCH = 5, 16, 2
RATE, MOMENTUM, DECAY, RADIUS = 0.1, 0.9, 5e-3, 0.7


class Linear(nn.Module):
    """Logits that are linear in the pixels; the statistic is the mean pixel, as a BatchNorm's."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Outputs:
        statistic = self.variable("batch_stats", "mean", jnp.zeros, ())
        if train:
            statistic.value = jax.lax.pmean(images.mean(), AXIS_NAME)
        flat = images.reshape(images.shape[0], -1)
        return Outputs(nn.Dense(CLASSES, use_bias=False)(flat)[None], flat)


def double(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


def fresh(model: nn.Module, average=None) -> TrainState:
    create = partial(create_state, model, make_optimizer(RATE), image_shape=tiny_network.SHAPE)
    init = jax.vmap(lambda i: create(key=jax.random.key(0), average=average), axis_name=AXIS_NAME)
    return double(jax.tree.map(lambda x: x[0], init(jnp.zeros(1))))


@cache
def mapped(model: nn.Module, mode: str, number: int, **options):
    """Devices, and the step on them."""
    devices = make_parallel(mode, jax.devices()[:number])
    context = Context(
        tiny_network.COUNTS,
        (0.0,) * getattr(model, "num_experts", 1),
        batch_size=BATCH,
        steps_per_epoch=PER_EPOCH,
        axis_name=AXIS_NAME,
    )
    optimizer = make_optimizer(RATE, MOMENTUM, True, DECAY)
    return devices, devices.map_step(
        make_train_step(model, optimizer, BalPoE(), context, **options)
    )


def run(model, steps: int, mode: str = "pmap", number: int = 1, spoilt: int = -1, **options):
    """The states and metrics after each step; in one of them a pixel is not a number."""
    devices, step = mapped(model, mode, number, **options)
    state, history = devices.replicate(fresh(model, options.get("average"))), []
    for i in range(steps):
        batch = tiny_network.batch(BATCH, i, np.float64, views=1)
        if i == spoilt:
            batch.images[3, 0, 0, 0] = np.nan
        state, metrics = step(state, devices.shard(batch))
        history.append(jax.device_get((state, metrics)))
    return history


def gradient_by_hand(kernel: np.ndarray, batch: TrainBatch) -> np.ndarray:
    """Of the mean cross-entropy of a linear classifier on mixed labels."""
    x = batch.images.reshape(BATCH, -1)
    odds = np.exp(x @ kernel)
    eye, weight = np.eye(CLASSES), batch.mix_weight[:, None]
    targets = weight * eye[batch.labels] + (1 - weight) * eye[batch.other_labels]
    return x.T @ (odds / odds.sum(axis=1, keepdims=True) - targets) / BATCH


@pytest.mark.integration
@pytest.mark.parametrize(
    ("mode", "number", "accumulate"), [("pmap", 1, 1), ("shard_map", 4, 1), ("pmap", 4, 2)]
)
def test_sam_takes_the_gradient_at_the_perturbed_weights(mode, number, accumulate) -> None:
    """With Nesterov's momentum and weight decay, at the weights themselves; of the whole batch."""
    history = run(Linear(), 3, mode, number, sam_radius=RADIUS, accumulate=accumulate)
    kernel = np.asarray(fresh(Linear()).params["Dense_0"]["kernel"])
    momentum = np.zeros_like(kernel)
    for i, (state, metrics) in enumerate(history):
        batch = tiny_network.batch(BATCH, i, np.float64, views=1)
        first = gradient_by_hand(kernel, batch)
        there = kernel + RADIUS * first / np.sqrt((first**2).sum())
        second = gradient_by_hand(there, batch)
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(second), rtol=1e-9)
        decayed = second + DECAY * kernel
        momentum = MOMENTUM * momentum + decayed
        kernel = kernel - RATE * (decayed + MOMENTUM * momentum)
        np.testing.assert_allclose(state.params["Dense_0"]["kernel"], kernel, rtol=1e-8)
        assert np.abs(second - first).max() > 1e-3


@pytest.mark.integration
def test_sams_second_pass_leaves_no_statistics_and_no_loss() -> None:
    """What BatchNorm keeps, and the loss that is shown, are those of the first pass."""
    model = tiny_network.experts(2, AXIS_NAME)
    (plain, shown), (sam, of_sam) = (run(model, 1, sam_radius=r)[0] for r in (0.0, RADIUS))
    chex.assert_trees_all_equal(sam.batch_stats, plain.batch_stats)
    np.testing.assert_array_equal(of_sam["loss"], shown["loss"])
    assert of_sam["grad_norm"] != shown["grad_norm"]


def test_sam_without_a_gradient_stays_where_it_is() -> None:
    """No division by zero: logits of a network of zeros on images of zeros."""
    devices, step = mapped(Linear(), "pmap", 1, sam_radius=RADIUS)
    batch = tiny_network.batch(BATCH, 0, np.float64, views=1)
    batch.images[:] = 0
    start = devices.replicate(fresh(Linear()))
    state, metrics = jax.device_get(step(start, devices.shard(batch)))
    assert metrics["finite"] and metrics["grad_norm"] == 0
    assert np.isfinite(state.params["Dense_0"]["kernel"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("average", [MovingAverage(0.8), EpochAverage(1)])
def test_devices_and_ways_of_mapping_agree(average) -> None:
    """With SAM and an average, four devices make what one makes; their copies do not drift."""
    model = tiny_network.experts(2, AXIS_NAME)
    options = {"sam_radius": RADIUS, "average": average}
    expected = run(model, 5, **options)[-1]
    for mode in ("pmap", "shard_map"):
        chex.assert_trees_all_close(
            run(model, 5, mode, 4, **options)[-1], expected, rtol=1e-8, atol=1e-10
        )


def kernels(history) -> np.ndarray:
    return np.stack([state.params["Dense_0"]["kernel"] for state, _ in history])


def test_a_moving_average_is_the_mean_by_powers_of_the_decay() -> None:
    decay = 0.8
    history = run(Linear(), 6, average=MovingAverage(decay))
    newest = kernels(history)
    statistics = np.array([state.batch_stats["mean"] for state, _ in history])
    for n, (state, _) in enumerate(history, 1):
        weights = decay ** np.arange(n)[::-1]
        weights /= weights.sum()
        kept = state.averages
        expected = np.tensordot(weights, newest[:n], 1)
        np.testing.assert_allclose(kept["params"]["Dense_0"]["kernel"], expected, rtol=1e-5)
        np.testing.assert_allclose(kept["batch_stats"]["mean"], weights @ statistics[:n], rtol=1e-5)


def test_a_decay_near_one_is_not_rounded_away() -> None:
    average, ones = MovingAverage(1 - 1e-7), {"kernel": jnp.ones(2)}
    kept = average.start({"kernel": jnp.zeros(2)}, {})
    for step in range(1, 4):
        kept = average.update(kept, jax.tree.map(lambda x: x * step, ones), {}, step, 1)  # noqa: B023
    np.testing.assert_allclose(kept["params"]["kernel"], 2.0, rtol=1e-5)


def test_epochs_ends_are_averaged_from_an_epoch_on() -> None:
    """Of seven steps, two an epoch, after the first epoch: those of steps 4 and 6."""
    history = run(Linear(), 7, average=EpochAverage(1))
    newest, start = kernels(history), fresh(Linear()).params["Dense_0"]["kernel"]
    third = (newest[3] + newest[5]) / 2
    expected = [start, start, start, newest[3], newest[3], third, third]
    for (state, _), kernel in zip(history, expected, strict=True):
        assert set(state.averages) == {"params"}
        np.testing.assert_allclose(state.averages["params"]["Dense_0"]["kernel"], kernel, rtol=1e-6)
    about = [EpochAverage(1).describe(step, 2) for step in (3, 4, 6)]
    assert about == [{"average": "none"}, *({"average": "swa", "epochs": n} for n in (1, 2))]


@pytest.mark.parametrize("average", [MovingAverage(0.8), EpochAverage(0)])
def test_a_step_that_is_left_out_counts_with_the_weights_that_stay(average) -> None:
    history = run(Linear(), 4, spoilt=1, average=average, skip_non_finite=True, sam_radius=RADIUS)
    assert [bool(metrics["finite"]) for _, metrics in history] == [True, False, True, True]
    newest = kernels(history)
    np.testing.assert_array_equal(newest[1], newest[0])
    weights = np.array([0.8**3, 0.8**2, 0.8, 1]) if average == MovingAverage(0.8) else [0, 1, 0, 1]
    expected = np.average(newest, axis=0, weights=weights)
    kept = history[-1][0].averages["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(kept, expected, rtol=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("sync", [True, False])
def test_statistics_are_the_mean_over_batches(sync: bool) -> None:
    """Of the global batch's means and variances, or of each device's own; by hand in NumPy."""
    model = tiny_network.experts(2, AXIS_NAME if sync else None)
    params = tiny_network.init(model)["params"]
    devices = make_parallel("shard_map", jax.devices()[:4])
    context = Context(tiny_network.COUNTS, axis_name=AXIS_NAME, sync_batch_norm=sync)
    batches = [tiny_network.batch(BATCH, i, np.float64, views=1) for i in range(3)]
    step = devices.map_step(make_statistics_step(model, context, len(batches)))
    zeros = jax.tree.map(np.zeros_like, jax.device_get(tiny_network.init(model)["batch_stats"]))
    carried = devices.replicate(double({"params": params, "batch_stats": zeros}))
    for batch in batches:
        carried = step(carried, devices.shard(batch))
    found = jax.device_get(carried)["batch_stats"]["trunk"]["BatchNorm_0"]
    layer = jax.device_get(params["trunk"]["Dense_0"])
    parts = [part for batch in batches for part in np.split(batch.images, 1 if sync else 4)]
    pixels = [(part @ layer["kernel"] + layer["bias"]).reshape(-1, 6) for part in parts]
    np.testing.assert_allclose(found["mean"], np.mean([x.mean(0) for x in pixels], 0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], np.mean([x.var(0) for x in pixels], 0), rtol=1e-5)


def test_what_is_off_is_not_compiled() -> None:
    """The step's text, its state, and what a checkpoint holds are those without the options."""

    def text(**options) -> str:
        devices, step = mapped(Linear(), "shard_map", 4, **options)
        state = devices.replicate(fresh(Linear(), options.get("average")))
        return step.lower(
            state, devices.shard(tiny_network.batch(BATCH, 0, np.float64, views=1))
        ).as_text()

    plain = text()
    assert text(sam_radius=0.0, average=None) == plain
    assert text(sam_radius=RADIUS) != plain and text(average=EpochAverage(1)) != plain
    state = fresh(Linear())
    assert state.averages is None
    paths = {str(path[0]) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert paths == {".step", ".params", ".batch_stats", ".opt_state"}
