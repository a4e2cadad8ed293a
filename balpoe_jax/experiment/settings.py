# SPDX-License-Identifier: Apache-2.0
"""What a config says of each phase of a training, and whether it can be built."""

import numpy as np
import numpy.typing as npt
from ml_collections import ConfigDict

from balpoe_jax import config as config_lib
from balpoe_jax import optim, parallel
from balpoe_jax.data.settings import AugmentSettings, MixSettings, TrainSettings
from balpoe_jax.errors import UserError
from balpoe_jax.methods import make_method

# Beyond all seeds of configs.
_PHASE_SEED = 2**31


def check(config: ConfigDict, devices: parallel.Parallel) -> None:
    """Refuses what cannot be built of a config on these devices, whatever the data.

    Raises:
        UserError (a `ValueError`): a value that is not valid, or a batch that the devices cannot
            share.
    """
    config_lib.check_config(config)
    method = make_method(config.method.to_dict())
    views = 1 + sum(name in config for name in config_lib.VIEWS)
    if views != method.views:
        raise UserError(
            f"The method {config.method.name} takes {method.views} views of an image, and the "
            f"config describes {views}; choose a method by the config file's argument method=..."
        )
    if config.mix.alpha > 0 and not method.supports_mixing:
        raise UserError(
            f"The method {config.method.name} knows no mixed labels: config.mix.alpha must be 0, "
            f"got {config.mix.alpha:g}."
        )
    if method.needs_global_batch and config.optim.accumulation_steps > 1:
        raise UserError(
            f"config.optim.accumulation_steps must be 1 for the method {config.method.name}, "
            f"whose loss is one of the whole batch, got {config.optim.accumulation_steps}."
        )
    test_view(config)
    configs = phase_configs(config)
    if len(configs) > len(method.phases()):
        raise UserError(
            f"config.phase2.epochs asks for a second phase, which the method {config.method.name} "
            "does not have as it is set; set it to 0 or choose another method."
        )
    for phase in configs:
        devices.check_batch_size(phase.batch_size, "batch_size", config.optim.accumulation_steps)
        settings = train_settings(phase, 0)
        settings.mix.check_groups(phase.batch_size, devices.num_hosts)
        learning_rates(phase)


def phase_settings(config: ConfigDict) -> tuple[TrainSettings, ...]:
    """How training batches are made in each phase of an experiment."""
    return tuple(train_settings(phase, i) for i, phase in enumerate(phase_configs(config)))


def train_settings(config: ConfigDict, phase: int) -> TrainSettings:
    """How training batches are made in a phase.

    Args:
        config: of the phase, see `phase_configs`.
        phase: its number, from 0.
    """
    return TrainSettings(
        batch_size=config.batch_size,
        # Another phase is not to begin with the batches that the first one began with.
        seed=config.seed + phase * _PHASE_SEED,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        augment=_augmentation(config, "augment"),
        mix=MixSettings(**config.mix.to_dict()),
        # The network would round them first of all; here that halves what is copied and sent.
        dtype=config.model.dtype,
        views=tuple(_augmentation(config, name) for name in config_lib.VIEWS if name in config),
        sampler=config.data.sampler,
        samples_per_class=config.data.samples_per_class,
        other_augment=(
            _augmentation(config, config_lib.OTHER_AUGMENT)
            if config_lib.OTHER_AUGMENT in config
            else None
        ),
    )


def phase_configs(config: ConfigDict) -> tuple[ConfigDict, ...]:
    """The config of each phase: the second one's section over the first one's fields, unmixed."""
    second = config.get("phase2")
    if not second or not second.epochs:
        return (config,)
    changed = config.copy_and_resolve_references()
    changed.total_epochs = second.epochs
    changed.batch_size = second.batch_size or config.batch_size
    changed.optim.update({name: second[name] for name in second if name in changed.optim})
    changed.data.update({name: second[name] for name in second if name in changed.data})
    changed.mix.alpha = 0.0
    return config, changed


def learning_rates(config: ConfigDict) -> npt.NDArray[np.float64]:
    """float64 `[epochs]`, the rate in force during each epoch of a phase."""
    return optim.learning_rates(
        config.total_epochs,
        config.optim.learning_rate,
        config.optim.schedule,
        config.optim.decay_epochs,
        config.optim.decay_factor,
        config.optim.warmup_epochs,
        config.optim.warmup_start,
    )


def test_view(config: ConfigDict) -> AugmentSettings:
    """The random views of test images, from which weights of experts are learnt."""
    name = config_lib.TEST_VIEW
    return _augmentation(config, name if name in config else "augment")


def _augmentation(config: ConfigDict, section: str) -> AugmentSettings:
    try:
        return AugmentSettings(**config[section].to_dict())
    except UserError as error:
        raise UserError(str(error).replace("augment.", f"config.{section}.", 1)) from error
