# SPDX-License-Identifier: Apache-2.0
"""The methods by name: how a model is trained, and what it predicts.

A method is a file here with a `Method`, which `base.py` describes, and `PRESETS`; a line below
makes its recipes arguments of every config file. `docs/methods.md` tells how to add one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from balpoe_jax.errors import UserError
from balpoe_jax.methods import (
    balpoe,
    bcl,
    lade,
    logit_adjustment,
    mdcs,
    mislas,
    mixed_images,
    ncl,
    paco,
    reweighting,
    ride,
    sade,
    tlc,
)
from balpoe_jax.methods.base import (
    Context,
    ExpertLosses,
    Losses,
    Method,
    Network,
    Phase,
    Prediction,
)
from balpoe_jax.methods.preset import Preset, PublishedResult

__all__ = [
    "METHODS",
    "PRESETS",
    "Context",
    "ExpertLosses",
    "Losses",
    "Method",
    "Network",
    "Phase",
    "Prediction",
    "Preset",
    "PublishedResult",
    "make_method",
    "settings",
]

_MODULES = (
    balpoe,
    mdcs,
    reweighting,
    logit_adjustment,
    mixed_images,
    lade,
    ride,
    sade,
    mislas,
    paco,
    bcl,
    ncl,
    tlc,
)

# What `method=` of a config file may be.
PRESETS: dict[str, Preset] = {
    name: recipe for module in _MODULES for name, recipe in module.PRESETS.items()
}

# What `config.method.name` may be, by the name of the class in lower case.
METHODS: dict[str, type[Method]] = {
    type(recipe.method).__name__.lower(): type(recipe.method) for recipe in PRESETS.values()
}


def settings(method: Method) -> dict[str, Any]:
    """The section `method` of a config: its name and its hyper-parameters."""
    return {"name": type(method).__name__.lower(), **dataclasses.asdict(method)}  # type: ignore[call-overload]


def make_method(section: Mapping[str, Any]) -> Method:
    """The method of a section that `settings` has made, its values perhaps changed since.

    Raises:
        UserError (a `ValueError`): an unknown name, another method's hyper-parameters, or values
            that are not valid.
    """
    fields = dict(section)
    name = fields.pop("name", None)
    if name not in METHODS:
        raise UserError(f"Unknown config.method.name {name!r}; choose from {', '.join(METHODS)}.")
    known = {field.name for field in dataclasses.fields(METHODS[name])}  # type: ignore[arg-type]
    if set(fields) != known:
        raise UserError(
            f"config.method.{min(set(fields) ^ known)} does not fit the method {name}; choose a "
            "method by the config file's argument method=... instead of by its name."
        )
    return METHODS[name](**fields)
