# SPDX-License-Identifier: Apache-2.0
"""Between a `ConfigDict`, which files and flags change, and the typed settings of an experiment.

A file in `configs/` has a function `get_config(arguments)` that starts from `default_config`, sets
what its data set needs, and returns it; `--config=FILE:key=value,...` passes the arguments, and
`--config.field=value` overrides any field afterwards. `resolve` makes settings of the result, once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from balpoe_jax.config.settings import Settings
from balpoe_jax.errors import UserError, shown
from balpoe_jax.methods import METHODS, Method, make_method, settings
from balpoe_jax.renames import current_values, rename_fields
from balpoe_jax.setting import Section, make_section, type_of

# Optional sections of a config, with the same fields as `augment`.
AUGMENTATIONS = ("view2", "view3", "test_view", "other_augment")


def default_config() -> ConfigDict:
    """Every field of an experiment with its default: the CIFAR recipe, without a data set."""
    return section_config(Settings())


def section_config(section: Section) -> ConfigDict:
    """A section as a config or a part of one, whose fields take values of their types."""
    config = ConfigDict()
    if isinstance(section, Method):
        config.name = section.name
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        kind, optional = type_of(type(section), field.name)
        if isinstance(value, Section):
            config[field.name] = section_config(value)
        elif optional and not issubclass(kind, Section):
            config[field.name] = placeholder(kind)
            config[field.name] = value
        elif value is not None:
            config[field.name] = value
    return config


def to_record(experiment: Settings) -> dict[str, Any]:
    """All fields of settings as nested dictionaries of plain values, for `config.json`."""
    record: dict[str, Any] = section_config(experiment).to_dict()
    return record


def resolve(config: ConfigDict) -> Settings:
    """The settings that a config describes, each within its range.

    Args:
        config: Config that a file and flags have made.

    Raises:
        UserError (a `ValueError`): naming the field, its value and what is valid.
    """
    return from_record(config.to_dict())


def from_record(record: Mapping[str, Any]) -> Settings:
    """The settings that a complete config describes, perhaps under older names.

    Args:
        record: Nested dictionaries; lists, which tuples become in JSON, become tuples again.

    Raises:
        UserError (a `ValueError`): as `resolve` does.
    """
    values = current_values(rename_fields(record))
    names = [field.name for field in dataclasses.fields(Settings)]
    if unknown := sorted(set(values) - set(names)):
        raise UserError(f"Unknown config field {shown(unknown[0])}; config has {', '.join(names)}.")
    made = {name: _make_value(name, value) for name, value in values.items()}
    return Settings(**made)


def _make_value(name: str, value: Any) -> Any:
    kind, _ = type_of(Settings, name)
    if not issubclass(kind, Section) or value is None:
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"config.{name} must be a section, got {shown(value)!r}.")
    return make_method(value) if kind is Method else make_section(kind, value, f"{name}.")


def with_defaults(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config, with defaults for the fields that are newer than the record.

    Args:
        recorded: Nested dictionaries, fields perhaps under older names; lists, which tuples become
            in JSON, become tuples again.
    """
    recorded = current_values(rename_fields(recorded))
    defaults = default_config().to_dict()
    method = recorded.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    if isinstance(name, str) and name in METHODS:
        defaults["method"] = settings(METHODS[name]())
    for section in AUGMENTATIONS:
        if section in recorded:
            defaults[section] = dict(defaults["augment"])
    return _merged(defaults, recorded)


def _merged(default: Any, recorded: Any) -> Any:
    """Recorded values over defaults, section by section."""
    if isinstance(recorded, Mapping):
        default = default if isinstance(default, Mapping) else {}
        merged = {name: _merged(default.get(name), value) for name, value in recorded.items()}
        return {**default, **merged}
    return tuple(_merged(None, x) for x in recorded) if isinstance(recorded, list) else recorded
