# SPDX-License-Identifier: Apache-2.0
"""Gradients over microbatches: the large batch's where rows do not meet, and by hand where they do.

In double precision, so that a wrong factor or a missing row cannot hide behind rounding.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.losses import expert_losses, log_prior
from balpoe_jax.methods import Context
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.base import soft_labels
from balpoe_jax.models import Outputs
from balpoe_jax.optim import make_optimizer
from balpoe_jax.parallel import AXIS_NAME, make_parallel
from balpoe_jax.step import TrainState, make_train_step

pytestmark = pytest.mark.usefixtures("x64")

CLASSES, BATCH = 5, 16
SHAPE = (4, 4, 3)
COUNTS = np.array([50, 20, 10, 5, 2])
TAUS = np.array([0.5, 1.5])
OPTIMIZER = make_optimizer(0.1)


class WithoutBatchNorm(nn.Module):
    """Two linear experts; the statistic is the mean image value, as a BatchNorm's would be."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Outputs:
        statistic = self.variable("batch_stats", "mean", jnp.zeros, ())
        if train:
            statistic.value = jax.lax.pmean(images.mean(), AXIS_NAME)
        flat = images.reshape(images.shape[0], -1)
        logits = jnp.stack([nn.tanh(nn.Dense(CLASSES)(flat)) for _ in range(2)])
        return Outputs(logits, flat)


class WithBatchNorm(nn.Module):
    """A layer on every pixel, BatchNorm, and two experts with a BatchNorm each."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Outputs:
        norm = partial(nn.BatchNorm, not train, momentum=0.9, axis_name=self.axis_name)
        x = nn.relu(norm()(nn.Dense(6)(images))).reshape(images.shape[0], -1)
        logits = jnp.stack([norm()(nn.Dense(CLASSES)(x)) for _ in range(2)])
        return Outputs(logits, x)


def batch() -> TrainBatch:
    random = np.random.default_rng(0)
    return TrainBatch(
        views=(random.normal(size=(BATCH, *SHAPE)),),
        labels=random.integers(0, CLASSES, BATCH).astype(np.int32),
        other_labels=random.integers(0, CLASSES, BATCH).astype(np.int32),
        mix_weight=np.full(BATCH, 0.3),
    )


def prior() -> jax.Array:
    return log_prior(COUNTS).astype(jnp.float64)


def double(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def fresh_state(model: nn.Module) -> TrainState:
    init = jax.vmap(partial(model.init, train=False), axis_name=AXIS_NAME, in_axes=(None, 0))
    variables = jax.tree.map(lambda x: x[0], init(jax.random.key(0), jnp.zeros((1, 1, *SHAPE))))
    variables = double(variables)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=OPTIMIZER.init(variables["params"]),
    )


def step(model: nn.Module, mode: str, num_devices: int, accumulate: int, sync: bool = True):
    devices = make_parallel(mode, jax.devices()[:num_devices])
    context = Context(COUNTS, tuple(TAUS), axis_name=AXIS_NAME, sync_batch_norm=sync)
    function = make_train_step(model, OPTIMIZER, BalPoE(), context, accumulate=accumulate)
    state = devices.replicate(fresh_state(model))
    return jax.device_get(devices.map_step(function)(state, devices.shard(batch())))


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
@pytest.mark.parametrize(("num_devices", "accumulate"), [(1, 4), (4, 2), (4, 4)])
def test_microbatches_make_the_step_of_the_large_batch(
    mode: str, num_devices: int, accumulate: int
) -> None:
    model = WithoutBatchNorm()
    state, metrics = step(model, mode, num_devices, accumulate)
    expected_state, expected_metrics = step(model, "pmap", 1, 1)
    chex.assert_trees_all_close((state, metrics), (expected_state, expected_metrics), rtol=1e-12)
    assert metrics["grad_norm"] > 0.1
    np.testing.assert_allclose(state.batch_stats["mean"], batch().images.mean(), rtol=1e-12)


def by_hand(num_devices: int, accumulate: int, sync: bool):
    """Gradients and statistics of every set of rows that is normalised together, averaged."""
    model = WithBatchNorm()
    state = fresh_state(model)
    rows = np.arange(BATCH).reshape(num_devices, accumulate, -1)
    sets = rows.swapaxes(0, 1).reshape(accumulate, -1) if sync else rows.reshape(-1, rows.shape[2])

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params, images, targets):
        outputs, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = expert_losses(outputs.logits, targets, prior(), jnp.asarray(TAUS))
        return losses.mean(), updated["batch_stats"]

    targets = soft_labels(batch(), CLASSES)
    found = [gradient(state.params, batch().images[rows], targets[rows]) for rows in sets]
    grads, stats = jax.tree.map(lambda *each: sum(each) / len(sets), *found)
    updates, _ = OPTIMIZER.update(grads, state.opt_state, state.params)
    return jax.device_get((jax.tree.map(jnp.add, state.params, updates), stats))


@pytest.mark.integration
@pytest.mark.slow_cases("pmap-4-False", "shard_map-4-True")
@pytest.mark.parametrize(
    ("mode", "num_devices", "sync"),
    [("pmap", 1, True), ("shard_map", 4, True), ("pmap", 4, False)],
)
def test_batch_norm_takes_each_microbatch_by_itself(
    mode: str, num_devices: int, sync: bool
) -> None:
    model = WithBatchNorm(AXIS_NAME if sync else None)
    state, _ = step(model, mode, num_devices, accumulate=2, sync=sync)
    expected = by_hand(num_devices, 2, sync)
    chex.assert_trees_all_close((state.params, state.batch_stats), expected, rtol=1e-9, atol=1e-12)


def test_a_batch_that_microbatches_cannot_share() -> None:
    devices = make_parallel("pmap", jax.devices()[:4])
    devices.check_batch_size(16, "batch_size", 2)
    message = (
        r"devices times optim.accumulation_steps, got 12 for 4 x 2; choose .* fewer microbatches"
    )
    with pytest.raises(UserError, match=message):
        devices.check_batch_size(12, "batch_size", 2)
