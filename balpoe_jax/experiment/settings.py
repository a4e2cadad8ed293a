# SPDX-License-Identifier: Apache-2.0
"""The settings of each phase's batches and rates, and whether the devices can share the batches."""

import numpy as np
import numpy.typing as npt

from balpoe_jax import optim, parallel
from balpoe_jax.config import Settings
from balpoe_jax.data.settings import TrainSettings

# Larger than any seed of a config, so that no phase has the seed of another run.
_PHASE_SEED = 2**31


def check(settings: Settings, devices: parallel.Parallel) -> None:
    """Refuses what cannot be built on these devices, whatever the data.

    Raises:
        UserError (a `ValueError`): a batch that the devices cannot share, or invalid rates.
    """
    for phase in settings.phases:
        devices.check_batch_size(phase.batch_size, "batch_size", phase.optim.accumulation_steps)
        phase.mix.check_groups(phase.batch_size, devices.num_hosts)
        learning_rates(phase)


def train_settings(settings: Settings) -> tuple[TrainSettings, ...]:
    """The settings of the training batches of each phase of an experiment."""
    return tuple(_train_settings(phase, index) for index, phase in enumerate(settings.phases))


def _train_settings(phase: Settings, index: int) -> TrainSettings:
    return TrainSettings(
        batch_size=phase.batch_size,
        # Another phase is not to begin with the batches that the first one began with.
        seed=phase.seed + index * _PHASE_SEED,
        mean=phase.data.mean,
        std=phase.data.std,
        augment=phase.augment,
        mix=phase.mix,
        # The network would round images first of all; rounded here, half the bytes are copied.
        dtype=phase.model.dtype,
        views=phase.views,
        sampler=phase.data.sampler,
        samples_per_class=phase.data.samples_per_class,
        other_augment=phase.other_augment,
    )


def learning_rates(phase: Settings) -> npt.NDArray[np.float64]:
    """The rate in force during each epoch of a phase, float64 `[epochs]`."""
    sgd = phase.optim
    rates = optim.learning_rates(
        phase.total_epochs,
        sgd.learning_rate,
        sgd.schedule,
        sgd.decay_epochs,
        sgd.decay_factor,
        sgd.warmup_epochs,
        sgd.warmup_start,
    )
    if sgd.swa is None or sgd.swa_learning_rate is None:
        return rates
    return optim.swa_rates(rates, sgd.swa, sgd.swa_learning_rate, sgd.swa_anneal_epochs)
