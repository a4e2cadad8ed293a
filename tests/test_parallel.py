# SPDX-License-Identifier: Apache-2.0
"""The train step on one and on four (fake) devices, mapped by pmap and by shard_map."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.data.types import EvalBatch, TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.methods import Context
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.base import soft_labels
from balpoe_jax.models import create_model
from balpoe_jax.optim import make_optimizer, rate_of_step
from balpoe_jax.parallel import AXIS_NAME, Prefetcher, make_parallel
from balpoe_jax.step import create_state, make_eval_step, make_train_step

NUM_CLASSES, BATCH, STEPS = 5, 16, 3
SHAPE = (8, 8, 3)
COUNTS = np.array([50, 20, 10, 5, 2])
TAUS = (0.5, 1.5)


@cache
def batches() -> tuple[TrainBatch, ...]:
    random = np.random.default_rng(0)

    def batch() -> TrainBatch:
        weight = np.full(BATCH, random.uniform(), np.float32)
        return TrainBatch(
            views=(random.normal(size=(BATCH, *SHAPE)).astype(np.float32),),
            labels=random.integers(0, NUM_CLASSES, BATCH).astype(np.int32),
            other_labels=random.integers(0, NUM_CLASSES, BATCH).astype(np.int32),
            mix_weight=weight,
        )

    return tuple(batch() for _ in range(STEPS))


def run(
    mode: str, num_devices: int, sync: bool = True, expert_map: str = "loop", remat: bool = False
):
    """State, metrics after a few steps, and how often the step was traced; made once each."""
    return _run(mode, num_devices, sync, expert_map, remat)


@cache
def _run(mode: str, num_devices: int, sync: bool, expert_map: str, remat: bool):
    devices = make_parallel(mode, jax.devices()[:num_devices])
    model = create_model(
        "resnet8",
        num_classes=NUM_CLASSES,
        num_experts=2,
        axis_name=AXIS_NAME if sync else None,
        expert_map=expert_map,
        remat=remat,
    )
    optimizer = make_optimizer(rate_of_step([0.05, 0.01], steps_per_epoch=2))
    create = jax.jit(partial(create_state, model, optimizer, image_shape=SHAPE))
    state = devices.replicate(create(key=jax.random.key(0)))
    context = Context(COUNTS, TAUS, axis_name=AXIS_NAME, sync_batch_norm=sync)
    step = make_train_step(model, optimizer, BalPoE(), context)
    traces = []

    def counted(state, batch):
        traces.append(mode)
        return step(state, batch)

    mapped = devices.map_step(counted, donate=True)
    history = []
    for batch in Prefetcher(batches(), devices):
        state, metrics = mapped(state, batch)
        history.append(jax.device_get(metrics))
    return state, history, len(traces)


def assert_close(left, right) -> None:
    chex.assert_trees_all_close(jax.device_get(left), jax.device_get(right), rtol=2e-5, atol=2e-5)


@pytest.mark.integration
@pytest.mark.slow_cases("pmap-1-vmap")
@pytest.mark.parametrize(
    ("mode", "num_devices", "expert_map"),
    [("pmap", 4, "loop"), ("shard_map", 4, "loop"), ("pmap", 1, "vmap")],
)
def test_mode_devices_and_expert_map_change_nothing(
    mode: str, num_devices: int, expert_map: str
) -> None:
    state, history, _ = run(mode, num_devices, expert_map=expert_map)
    expected_state, expected_history, _ = run("pmap", 1)
    assert_close(history, expected_history)
    assert_close(state, expected_state)
    assert int(state.step) == STEPS


@pytest.mark.slow_cases("shard_map-loop", "pmap-vmap")
@pytest.mark.parametrize(("mode", "expert_map"), [("pmap", "vmap"), ("shard_map", "loop")])
def test_rematerialisation_changes_nothing(mode: str, expert_map: str) -> None:
    """Its second forward pass takes the statistics of all devices again."""
    state, history, _ = run(mode, 4, expert_map=expert_map, remat=True)
    expected_state, expected_history, _ = run("pmap", 1)
    assert_close(history, expected_history)
    assert_close(state, expected_state)


@pytest.mark.integration
@pytest.mark.slow_cases("False-pmap", "False-shard_map")
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
@pytest.mark.parametrize("sync", [True, False])
def test_all_shards_stay_equal(mode: str, sync: bool) -> None:
    """pmap checks nothing: a forgotten mean would let the devices drift apart in silence."""
    state = run(mode, 4, sync)[0]
    for leaf in jax.tree.leaves(state):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == 3
        for other in others:
            np.testing.assert_array_equal(other, first)


@pytest.mark.integration
def test_statistics_per_device_are_another_result() -> None:
    state = run("shard_map", 4, sync=False)[0]
    with pytest.raises(AssertionError):
        assert_close(state.batch_stats, run("pmap", 1)[0].batch_stats)


@pytest.mark.slow
def test_statistics_per_device_are_those_of_the_twin() -> None:
    assert_close(run("pmap", 4, sync=False)[0], run("shard_map", 4, sync=False)[0])


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_one_trace_serves_all_steps(mode: str) -> None:
    assert run(mode, 4)[2] == 1


def test_donated_state_is_given_up() -> None:
    devices = make_parallel("pmap")
    state = devices.replicate(jnp.ones(3))
    mapped = devices.map_step(lambda s, b: s + jax.lax.pmean(b.sum(), AXIS_NAME), donate=True)
    mapped(state, devices.shard(np.ones((8,), np.float32)))
    assert state.is_deleted()


@pytest.mark.integration
@pytest.mark.slow_cases("pmap")
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_evaluation_gathers_the_whole_batch_in_order(mode: str) -> None:
    devices = make_parallel(mode, jax.devices()[:4])
    model = create_model("resnet8", num_classes=NUM_CLASSES, num_experts=2, axis_name=AXIS_NAME)
    init = jax.jit(partial(model.init, train=False))
    variables = init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    batch = EvalBatch(
        images=batches()[0].images,
        labels=np.arange(BATCH, dtype=np.int32),
        mask=np.arange(BATCH) < 13,
    )
    mapped = devices.map_step(make_eval_step(model, BalPoE(), Context(COUNTS, axis_name=AXIS_NAME)))
    output = jax.device_get(mapped(devices.replicate(variables), devices.shard(batch)))
    expected = jax.jit(partial(model.apply, train=False))(variables, batch.images).logits
    np.testing.assert_allclose(output["logits"], expected, atol=1e-4)
    np.testing.assert_array_equal(output["labels"], batch.labels)
    np.testing.assert_array_equal(output["mask"], batch.mask)


def test_batches_that_devices_cannot_share() -> None:
    with pytest.raises(UserError, match="multiple of the number of devices, got 6 for 4"):
        make_parallel("pmap", jax.devices()[:4]).check_batch_size(6, "batch_size")
    with pytest.raises(UserError, match="Unknown parallel mode 'mesh'; choose from pmap"):
        make_parallel("mesh")


def test_processes_that_have_not_joined_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match=r"one of 4 that JAX sees.* start all .* --distributed"):
        make_parallel()


def test_prefetcher_yields_everything_once_in_order() -> None:
    devices = make_parallel("shard_map")
    count = 4 * len(jax.devices())
    source = ({"x": np.full(count, i)} for i in range(5))
    prefetcher = Prefetcher(source, devices, depth=3)
    assert [int(batch["x"][0]) for batch in prefetcher] == list(range(5))
    assert prefetcher.waited > 0


def test_mixed_targets_are_the_weighted_pair() -> None:
    batch = TrainBatch((), jnp.array([0, 2]), jnp.array([1, 2]), jnp.array([0.25, 0.6]))
    expected = [[0.25, 0.75, 0], [0, 0, 1]]
    np.testing.assert_allclose(soft_labels(batch, 3), expected, rtol=1e-6)
