# SPDX-License-Identifier: Apache-2.0
"""The range of each number of a config, and the check of all of its fields.

What is outside of a range cannot be meant, and could not be run.
"""

from typing import Any

from ml_collections import ConfigDict

from balpoe_jax.config.fields import (
    AUGMENTATIONS,
    BAD_IMAGE_POLICIES,
    DTYPES,
    PRECISIONS,
    resolve_taus,
)
from balpoe_jax.errors import UserError, shown
from balpoe_jax.methods import make_method

# In one call of a compiled program, whose plan is made on the host and sent to the devices.
_MOST_STEPS = 10_000

_MANY, _SEED = 10**6, 2**31 - 1
_FINITE = (-1e9, 1e9)

# Least and most, both included.
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, _SEED),
    "total_epochs": (1, _MANY),
    "batch_size": (1, 2**20),
    "log_every_steps": (1, 10**9),
    "data.imbalance_ratio": (1, 1e9),
    "data.selection_seed": (0, _SEED),
    "data.image_size": (0, 4096),
    "data.eval_resize": (0, 8192),
    "data.threads": (0, 1024),
    "data.samples_per_class": (1, 2**20),
    "augment.crop_padding": (0, 1024),
    "augment.cutout": (0, 8192),
    "augment.crop_area": (0, 1),
    "augment.hue": (0, 0.5),
    "augment.jitter_probability": (0, 1),
    "augment.grayscale": (0, 1),
    "augment.blur": (0, 1),
    "augment.randaugment_layers": (1, 100),
    "augment.randaugment_magnitude": (0, 10),
    "mix.alpha": (0, 1e6),
    "mix.groups": (1, 2**20),
    "mix.probability": (0, 1),
    "mix.first_epoch": (0, _MANY),
    "mix.last_epoch": (0, _MANY),
    "mix.remix_kappa": (1, 1e9),
    "mix.remix_tau": (0, 1),
    "mix.sampling_power": (-10, 10),
    "model.num_experts": (1, 100),
    "model.classifier_scale": (1e-6, 1e6),
    "model.shared_stages": (-2, 4),
    "loss.tau_min": _FINITE,
    "loss.tau_max": _FINITE,
    "optim.learning_rate": (0, 1e30),
    "optim.momentum": (0, 1e9),
    "optim.weight_decay": (0, 1e9),
    "optim.decay_factor": (0, 1e30),
    "optim.warmup_epochs": (0, _MANY),
    "optim.warmup_start": (0, 1),
    "optim.accumulation_steps": (1, 2**20),
    "optim.skip_non_finite": (0, _MANY),
    "eval.batch_size": (1, 2**20),
    "eval.num_bins": (1, 10**4),
    "eval.every_epochs": (0, _MANY),
    "eval.held_out_per_class": (0, _MANY),
    "eval.prior_strength": (0, 1e9),
    "eval.shift_test_level": (0, 1),
    "eval.expert_weights_epochs": (0, _MANY),
    "eval.expert_weights_rate": (0, 1e9),
    "checkpoint.every_epochs": (1, _MANY),
    "checkpoint.keep": (1, _MANY),
}

# Of the members of tuples; any number of them where none is given.
MEMBERS: dict[str, tuple[int | None, float, float]] = {
    "data.mean": (3, *_FINITE),
    "data.std": (3, 1e-6, 1e9),
    "data.shot_thresholds": (2, 0, 1e9),
    "augment.color_jitter": (3, 0, 1),
    "loss.taus": (None, *_FINITE),
    "optim.decay_epochs": (None, 0, _MANY),
    "eval.shift_ratios": (None, 1 + 1e-9, 1e12),
    "profile.steps": (None, 1, 1e12),
}


def check_config(config: ConfigDict) -> None:
    """Refuses values that no part below would refuse by itself, before anything is written.

    Raises:
        UserError (a `ValueError`): naming the field, its value and what is valid.
    """
    for field, limits in LIMITS.items():
        for named in _with_views(config, field):
            _check_number(config, named, limits)
    for field, limits_of_members in MEMBERS.items():
        for named in _with_views(config, field):
            _check_members(config, named, limits_of_members)
    if config.model.dtype not in DTYPES:
        raise UserError(
            f"Unknown config.model.dtype {shown(config.model.dtype)!r}; choose from "
            f"{', '.join(DTYPES)}."
        )
    precision = config.model.precision
    if precision is not None and (precision not in PRECISIONS or config.model.dtype != "float32"):
        raise UserError(
            f"config.model.precision must be one of {', '.join(PRECISIONS)} with "
            f"config.model.dtype=float32, or None, got {shown(precision)!r} with "
            f"{config.model.dtype}."
        )
    if config.data.on_bad_image not in BAD_IMAGE_POLICIES:
        raise UserError(
            f"Unknown config.data.on_bad_image {shown(config.data.on_bad_image)!r}; choose from "
            f"{', '.join(BAD_IMAGE_POLICIES)}."
        )
    dispatched = config.data.steps_per_dispatch
    if dispatched is not None and not 1 <= dispatched <= _MOST_STEPS:
        raise UserError(
            f"config.data.steps_per_dispatch must be 1 to {_MOST_STEPS}, or None for the default; "
            f"got {shown(dispatched)}."
        )
    steps = tuple(config.profile.steps)
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(
            "config.profile.steps must be the first and the last step to trace, counted from 1, "
            f"such as (11,13); got {steps}."
        )
    resolve_taus(config)
    make_method(config.method.to_dict())


def _with_views(config: ConfigDict, field: str) -> list[str]:
    """The field, and if it is one of augmentation the same one of each further view."""
    section, _, name = field.partition(".")
    sections = AUGMENTATIONS if section == "augment" else ()
    views = [view for view in sections if view in config]
    return [field, *(f"{view}.{name}" for view in views)]


def _check_number(config: ConfigDict, field: str, limits: tuple[float, float]) -> None:
    value, (least, most) = _field(config, field), limits
    if not value >= least:
        raise UserError(f"config.{field} must be at least {least:g}, got {shown(value)}.")
    if not value <= most:
        raise UserError(f"config.{field} must be at most {most:.10g}, got {shown(value)}.")


def _check_members(config: ConfigDict, field: str, limits: tuple[int | None, float, float]) -> None:
    values, (length, least, most) = _field(config, field), limits
    if not (isinstance(values, tuple | list) and all(map(_is_number, values))) or (
        length is not None and len(values) != length
    ):
        wanted = "numbers" if length is None else f"{length} numbers"
        raise UserError(f"config.{field} must be {wanted}, such as (1,2,3); got {shown(values)}.")
    if not all(least <= value <= most for value in values):
        raise UserError(
            f"config.{field} must be from {least:.10g} to {most:g}, got {shown(values)}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _field(config: ConfigDict, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value[name]
    return value
