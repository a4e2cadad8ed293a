# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules by epoch, and the optimizer of the reference."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from balpoe_jax.errors import UserError
from balpoe_jax.one_vector import over_one_vector

SCHEDULES = ("step", "cosine", "cosine_after_warmup")


def learning_rates(
    epochs: int,
    base_lr: float,
    schedule: str = "step",
    boundaries: Sequence[int] = (),
    factor: float = 0.1,
    warmup_epochs: int = 0,
    warmup_start: float = 0.0,
) -> npt.NDArray[np.float64]:
    """The learning rate in force during each epoch.

    The reference steps its schedule once at the end of an epoch, so the rate is constant within
    one. `step` multiplies by `factor` from each boundary on (0-based: boundary 160 is the 161st
    epoch) and, for the first `warmup_epochs`, by `(1 + epoch) / warmup_epochs`. `cosine` is
    `base_lr * (1 + cos(pi * epoch / epochs)) / 2`; it has no warm-up in the reference, and gets
    the same factor here when one is asked for. `cosine_after_warmup`, PaCo's and BCL's, begins
    after the warm-up and one epoch on, `base_lr * (1 + cos(pi * (epoch + 1) / (epochs + 1))) / 2`
    with both counted from there.

    Args:
        epochs: Number of epochs, at least 1.
        base_lr: Rate before any factor.
        schedule: Name of the schedule, one of `SCHEDULES`.
        boundaries: Increasing epochs at which `step` decays; ignored by the others.
        factor: Factor of each decay.
        warmup_epochs: Length of the linear warm-up in epochs; 0 for none.
        warmup_start: Factor from which it rises, that of an epoch before the first.

    Returns:
        float64 `[epochs]`.

    Raises:
        UserError (a `ValueError`): an unknown schedule or numbers out of range.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"Unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}.")
    if epochs < 1 or warmup_epochs < 0 or not base_lr >= 0 or not 0 <= warmup_start <= 1:
        raise UserError(
            "Expected epochs >= 1, warmup_epochs >= 0, base_lr >= 0 and a warmup_start from 0 to "
            f"1, got {epochs}, {warmup_epochs}, {base_lr} and {warmup_start}."
        )
    if list(boundaries) != sorted(boundaries):
        raise UserError(f"Schedule boundaries must increase, got {tuple(boundaries)}.")
    rates = np.empty(epochs, np.float64)
    for epoch in range(epochs):
        if schedule == "step":
            scale = factor ** sum(epoch >= boundary for boundary in boundaries)
        elif schedule == "cosine":
            scale = (1 + math.cos(math.pi * epoch / epochs)) / 2
        else:
            done = max(0, epoch + 1 - warmup_epochs) / (epochs + 1 - warmup_epochs)
            scale = (1 + math.cos(math.pi * done)) / 2 if epoch >= warmup_epochs else 1.0
        if epoch < warmup_epochs:
            scale *= warmup_start + (1 - warmup_start) * (1 + epoch) / warmup_epochs
        rates[epoch] = base_lr * scale
    if not rates.max() <= np.finfo(np.float32).max:  # in which the update is computed
        raise UserError(
            f"The learning rate would grow to {rates.max():g}; lower optim.learning_rate or "
            "optim.decay_factor."
        )
    return rates


def swa_rates(
    rates: npt.NDArray[np.float64], first_epoch: int, swa_rate: float, anneal_epochs: int
) -> npt.NDArray[np.float64]:
    """Rates that go over to a constant one for stochastic weight averaging, as PyTorch's `SWALR`.

    The first epoch whose weights are averaged still has its own rate. From there a half cosine
    leads to the constant rate, whether it is higher or lower.

    Args:
        rates: Rate in force during each epoch before the change, `[epochs]`.
        first_epoch: Number of epochs before the first one whose weights are averaged.
        swa_rate: Constant rate.
        anneal_epochs: Number of epochs that the change takes; 0 for none.

    Returns:
        float64 `[epochs]`.
    """
    done = np.arange(len(rates)) - first_epoch
    share = np.clip(done / max(1, anneal_epochs), 0, 1)
    share = (1 - np.cos(np.pi * share)) / 2
    start = rates[min(first_epoch, len(rates) - 1)]
    return np.where(done > 0, swa_rate * share + start * (1 - share), rates)


def rate_of_step(
    rates: npt.ArrayLike, steps_per_epoch: int
) -> Callable[[jax.Array | int], jax.Array]:
    """A schedule for Optax: the rate of the epoch that a step belongs to.

    Args:
        rates: Rate of each epoch, `[epochs]`; the last one stays in force beyond the end.
        steps_per_epoch: Number of steps in an epoch, at least 1.
    """
    table = jnp.asarray(rates, jnp.float32)

    def schedule(step: jax.Array | int) -> jax.Array:
        return table[jnp.minimum(step // steps_per_epoch, len(table) - 1)]

    return schedule


def followed_by(
    optimizer: optax.GradientTransformation, change: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimizer whose updates go through a change that keeps no state.

    Unlike `optax.chain`, it leaves the structure of the optimizer's state as it is.

    Args:
        optimizer: Optimizer whose state it has.
        change: Transformation of updates whose own state holds no arrays; it sees the parameters.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        updates, _ = change.update(updates, change.init(params), params)
        return updates, state

    return optax.GradientTransformation(optimizer.init, update)


def make_optimizer(
    learning_rate: float | Callable,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
    as_one_vector: bool = False,
) -> optax.GradientTransformation:
    """SGD as PyTorch does it: L2 added to the gradient before momentum, on every parameter.

    Every parameter means BatchNorm's scales and biases too: the reference makes no exception.

    Args:
        learning_rate, momentum, nesterov: Arguments of `optax.sgd`.
        weight_decay: Factor of the parameters that are added to the gradient.
        as_one_vector: Whether all parameters are updated at once, see `one_vector`: the numbers and
            the state are the same.
    """
    optimizer = optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )
    return over_one_vector(optimizer) if as_one_vector else optimizer
