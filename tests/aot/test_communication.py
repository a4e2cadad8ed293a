# SPDX-License-Identifier: Apache-2.0
"""What a compiled train step sends between four devices, to the byte."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.aot.hlo import Collective, collectives
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.methods import Context
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.models import create_model
from balpoe_jax.optim import make_optimizer
from balpoe_jax.parallel import AXIS_NAME, make_parallel
from balpoe_jax.step import create_state, make_train_step

BATCH = 16
FLOAT = 4  # bytes
NORMS = 7  # of ResNet-8


def compile_step(sync: bool, accumulate: int) -> tuple[list[tuple[str, int]], int, int]:
    """Collectives of the compiled step; numbers in parameters (and losses) and in statistics."""
    devices = make_parallel("shard_map", jax.devices()[:4])
    model = create_model(
        "resnet8", num_classes=5, num_experts=1, axis_name=AXIS_NAME if sync else None
    )
    optimizer = make_optimizer(0.1)
    context = Context(np.array([9, 5, 3, 2, 1]), (1.0,), axis_name=AXIS_NAME, sync_batch_norm=sync)
    step = make_train_step(model, optimizer, BalPoE(), context, accumulate=accumulate)
    create = partial(create_state, model, optimizer, image_shape=(8, 8, 3))
    state = jax.eval_shape(create, key=jax.random.key(0))
    batch = TrainBatch(
        views=(jax.ShapeDtypeStruct((BATCH, 8, 8, 3), jnp.float32),),
        labels=jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        other_labels=jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        mix_weight=jax.ShapeDtypeStruct((BATCH,), jnp.float32),
    )
    lowered = devices.map_step(step).lower(state, batch)
    # What is sent is settled before machine code is made, which need not be fast here.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    sent = sum(x.size for x in jax.tree.leaves(state.params)) + 2  # the loss and the expert's
    return (
        collectives(compiled.as_text()),
        sent,
        sum(x.size for x in jax.tree.leaves(state.batch_stats)),
    )


@pytest.mark.integration
@pytest.mark.slow_cases("2")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_statistics_per_device_leave_one_all_reduce_a_step(accumulate: int) -> None:
    """Of gradients and losses, and of the running averages, so that the state stays replicated."""
    found, parameters, statistics = compile_step(sync=False, accumulate=accumulate)
    assert found == [Collective("all-reduce", 1, FLOAT * (parameters + statistics))]


@pytest.mark.integration
@pytest.mark.slow_cases("2")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_global_statistics_add_two_small_ones_an_application(accumulate: int) -> None:
    """Forward a mean and a mean of squares, backward their gradients; nothing else is sent.

    A CPU's compiler joins some of the gradients' with the statistics', so that bytes are the proof,
    and the number of all-reduces a bound; a TPU's joins all gradients in one.
    """
    (found,), parameters, statistics = compile_step(sync=True, accumulate=accumulate)
    assert found.kind == "all-reduce"
    assert found.bytes == FLOAT * (parameters + accumulate * 2 * statistics)
    if accumulate == 1:
        assert found.count <= 2 * NORMS + 1 + 3
    else:  # those in the loop, and the gradients in one
        assert found.count == accumulate * 2 * NORMS + 1
