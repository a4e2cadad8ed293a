# SPDX-License-Identifier: Apache-2.0
"""Short trainings of every preset with tiny experts, on one or several devices."""

import dataclasses
from functools import cache, partial

import jax
import numpy as np

from balpoe_jax.config import resolve
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.methods import PRESETS, Context, Network, make_method
from balpoe_jax.methods.base import map_by_path
from balpoe_jax.optim import make_optimizer
from balpoe_jax.parallel import AXIS_NAME, make_parallel
from balpoe_jax.step import create_state, make_train_step
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config

STEPS_PER_EPOCH, EPOCHS, BATCH = 2, 4, 16
# Low, because a sum over experts of losses at scale 30 amplifies rounding at a higher rate.
RATE = 0.01


@cache
def parts(name: str, axis_name: str | None = AXIS_NAME):
    """Method, context and network of a preset for tiny experts, as its digits config has them."""
    config = get_config("digits_lt", f"method={name},epochs={EPOCHS}")
    method = make_method(config.method.to_dict())
    cosine = config.model.classifier == "cosine"
    context = Context(
        tiny_network.COUNTS,
        resolve(config).taus,
        scale=config.model.classifier_scale if cosine else 1.0,
        batch_size=BATCH,
        steps_per_epoch=STEPS_PER_EPOCH,
        axis_name=axis_name,
    )
    experts = tiny_network.experts(
        config.model.num_experts, axis_name, config.model.classifier, context.scale
    )
    if PRESETS[name].teacher:
        module = tiny_network.experts(2, axis_name)
        with jax.enable_x64(False):
            variables = tiny_network.init(module, seed=1)
        context = dataclasses.replace(context, teacher=Network(module, **variables))
    return method, context, method.network(experts, context)


@cache
def fresh(name: str):
    """A preset's first state in single precision, even if a test in double precision asks first."""
    method, context, network = parts(name)
    create = partial(create_state, network, make_optimizer(RATE), image_shape=tiny_network.SHAPE)
    init = lambda network, key: method.init_state(network, context, key)  # noqa: E731
    with jax.enable_x64(False):
        make = jax.jit(lambda key: create(key, init_method_state=init))
        return jax.device_get(make(jax.random.key(0)))


@cache
def mapped_step(name: str, mode: str, num_devices: int, phase: int = 0):
    """Some devices and the step on them, which compiles once."""
    method, context, network = parts(name)
    devices = make_parallel(mode, jax.devices()[:num_devices])
    step = make_train_step(network, make_optimizer(RATE), method, context, phase)
    return devices, devices.map_step(step)


def batch_of(name: str, seed: int, dtype=np.float32) -> TrainBatch:
    """A batch with the number of views that a method takes."""
    views = parts(name)[0].views
    return tiny_network.batch(BATCH, seed=seed, dtype=dtype, views=views)


@cache
def run(name: str, mode: str, num_devices: int, phase: int = 0, dtype=np.float32):
    """State and metrics after each step of a phase that begins with the fresh state."""
    assert dtype == np.float32 or jax.config.jax_enable_x64  # what is kept would be of another type
    devices, step = mapped_step(name, mode, num_devices, phase)
    start = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, fresh(name))
    state, history = devices.replicate(start), []
    for i in range(STEPS_PER_EPOCH * EPOCHS):
        state, metrics = step(state, devices.shard(batch_of(name, i, dtype)))
        history.append(jax.device_get((state, metrics)))
        for leaf in jax.tree.leaves(state):  # pmap would not notice devices that drift apart
            first_copy, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
            for other in others:
                np.testing.assert_array_equal(other, first_copy)
    return history


def moved(name: str) -> set[str]:
    """Paths of the parameters that the second phase changes, and "statistics" if they change."""
    before, after = fresh(name), run(name, "pmap", 1, 1)[-1][0]
    same = map_by_path(lambda path, leaf: path, before.params)
    pairs = zip(*(jax.tree.leaves(tree) for tree in (before.params, after.params)), strict=True)
    found = {
        path
        for path, (old, new) in zip(jax.tree.leaves(same), pairs, strict=True)
        if not np.array_equal(old, new)
    }
    statistics = jax.tree.map(np.array_equal, before.batch_stats, after.batch_stats)
    return found | (set() if all(jax.tree.leaves(statistics)) else {"statistics"})


def phases(name: str) -> range:
    """Numbers of the phases of a method."""
    return range(len(parts(name)[0].phases()))


# Presets that communicate between devices like another one, which covers them.
COVERED = {
    *("cross_entropy_cb", "ce_drw", "focal", "ldam"),  # by focal_cb and ldam_drw
    "remix_drw",  # by any mean over rows
    *("logit_adjustment", "pc_softmax"),  # by cross_entropy
    "ride",  # by ride_distill
    "los_new",  # by los, but for what its second phase begins with
}


def distinct() -> list[str]:
    """One preset for each method with its hyper-parameters, for one expert and for several."""
    kinds: dict[tuple, str] = {}
    for name, preset in PRESETS.items():
        if name not in COVERED:
            kinds.setdefault((str(preset.method), preset.experts > 1), name)
    return list(kinds.values())


DISTINCT = distinct()
