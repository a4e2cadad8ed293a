# SPDX-License-Identifier: Apache-2.0
"""States of trainings with one parameter."""

import jax
import jax.numpy as jnp

from balpoe_jax.step import TrainState


def make_state(step: int, size: int = 8) -> TrainState:
    """A state at a step, whose parameter is the number of the step."""
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"kernel": jnp.full((size,), float(step))},
        batch_stats={"mean": jnp.zeros(3)},
        opt_state=({"trace": jnp.ones(size)},),
    )


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and placement of a state, to restore into."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
