# SPDX-License-Identifier: Apache-2.0
"""The methods by name: how a model is trained, and what it predicts.

A file here with `PRESETS` holds one or more methods; `base.py` describes the class `Method`. The
names of presets are the values of `method=` of every config file. Adding a file adds a method;
`docs/methods.md` tells how.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from balpoe_jax.errors import UserError
from balpoe_jax.methods.base import (
    Context,
    ExpertLosses,
    Losses,
    Method,
    Network,
    Phase,
    Prediction,
    epochs,
    scaled_fields,
)
from balpoe_jax.methods.preset import Preset, PublishedResult

__all__ = [
    "METHODS",
    "MODULES",
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
    "epochs",
    "make_method",
    "scaled_fields",
    "settings",
]


def _find_modules() -> tuple[ModuleType, ...]:
    """The files of this folder that have presets: BalPoE's, then the others by name."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    public = [name for name in names if not name.startswith("_")]
    ordered = sorted(public, key=lambda name: (name != "balpoe", name))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in ordered]
    return tuple(module for module in modules if hasattr(module, "PRESETS"))


def _collect(modules: Iterable[ModuleType]) -> tuple[dict[str, Preset], dict[str, type[Method]]]:
    """Presets by their names, and the classes of their methods by theirs in lower case.

    Raises:
        UserError (a `ValueError`): two files that use one name.
    """
    presets: dict[str, Preset] = {}
    classes: dict[str, type[Method]] = {}
    for module in modules:
        for name, preset in module.PRESETS.items():
            kind = type(preset.method)
            taken = name in presets or classes.get(kind.__name__.lower(), kind) is not kind
            if taken:
                raise UserError(
                    f"Expected names of presets and classes that no other method has, got "
                    f"{name!r} and {kind.__name__} in {module.__name__}; rename one."
                )
            presets[name], classes[kind.__name__.lower()] = preset, kind
    return presets, classes


MODULES = _find_modules()

# The values of `method=` of a config file, and of `config.method.name`.
PRESETS, METHODS = _collect(MODULES)


def settings(method: Method) -> dict[str, Any]:
    """The section `method` of a config: its name and its hyper-parameters."""
    return {"name": method.name, **dataclasses.asdict(method)}  # type: ignore[call-overload]


def make_method(section: Mapping[str, Any]) -> Method:
    """The method of a config's section `method`, which `settings` has made.

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
