# SPDX-License-Identifier: Apache-2.0
"""Averages of a training's weights, which are evaluated in place of the newest ones.

An exponential moving average (EMA) takes the weights after every step, stochastic weight averaging
(SWA; Izmailov et al., UAI 2018) those after every epoch from some epoch on. How much each counts is
a function of the number of steps, so that an average is nothing but arrays like the parameters.

What BatchNorm knows of the activations must fit the averaged weights:

- EMA averages the running statistics by the same rule, as the moving averages of timm and Keras do:
  the newest weights are near the average, and so are their statistics.
- SWA's weights are far from all that went into them. Their statistics are computed before an
  evaluation, from one epoch of training images, as SWA's and SURE's authors do.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """EMA: each step moves the average towards the newest weights.

    The average of `n` steps is the mean of their weights, in which a step counts `decay` times what
    the next one does. So the initial weights are forgotten after one step, whatever the decay.

    Attributes:
        decay: Share of the average that stays at each step, after many; between 0 and 1.
    """

    decay: float

    def start(self, params: Any, batch_stats: Any) -> dict[str, Any]:
        """What is kept of a training that begins with these, as arrays of its own."""
        return jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})

    def describe(self, steps: int, steps_per_epoch: int) -> dict[str, Any]:
        """What `results.json` says of the weights after some steps."""
        return {"average": "ema", "decay": self.decay}

    def update(
        self, kept: Any, params: Any, batch_stats: Any, steps: jax.Array, steps_per_epoch: int
    ) -> dict[str, Any]:
        """What is kept after a step.

        Args:
            kept: What was kept before it.
            params: Parameters after the step.
            batch_stats: Running averages of BatchNorm after the step.
            steps: Number of steps since `start`, an int32 scalar of at least 1.
            steps_per_epoch: Number of steps in an epoch.
        """
        rate = math.log(self.decay)
        # (1 - decay) / (1 - decay^n), without the rounding of a decay near 1.
        share = math.expm1(rate) / jnp.expm1(steps * rate)
        newest = {"params": params, "batch_stats": batch_stats}
        return _move(newest, kept, share)


@dataclasses.dataclass(frozen=True)
class EpochAverage:
    """SWA: the mean of the weights at the end of each epoch after the first ones.

    Attributes:
        first_epoch: Number of epochs before the first one whose weights count.
    """

    first_epoch: int

    def start(self, params: Any, batch_stats: Any) -> dict[str, Any]:
        """What is kept of a training that begins with these, which is no average yet."""
        return jax.tree.map(jnp.copy, {"params": params})

    def update(
        self, kept: Any, params: Any, batch_stats: Any, steps: jax.Array, steps_per_epoch: int
    ) -> dict[str, Any]:
        """What is kept after a step; arguments as of `MovingAverage.update`."""
        number = self.count(steps, steps_per_epoch)
        takes = (steps % steps_per_epoch == 0) & (number > 0)
        moved = _move({"params": params}, kept, 1 / jnp.maximum(number, 1))
        return jax.tree.map(lambda new, old: jnp.where(takes, new, old), moved, kept)

    def describe(self, steps: int, steps_per_epoch: int) -> dict[str, Any]:
        """What `results.json` says of the weights after some steps."""
        number = self.count(steps, steps_per_epoch)
        return {"average": "swa", "epochs": number} if number > 0 else {"average": "none"}

    def count(self, steps: Any, steps_per_epoch: int) -> Any:
        """How many epochs' weights the average holds after some steps; below 1 for none yet."""
        return steps // steps_per_epoch - self.first_epoch


WeightAverage = MovingAverage | EpochAverage


def _move(newest: Any, kept: Any, share: jax.Array) -> Any:
    """`share` of the newest and the rest of what was kept, in the types of what was kept."""
    moved = optax.incremental_update(newest, kept, share)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, kept)
