# SPDX-License-Identifier: Apache-2.0
"""The arguments after a config file's colon: `--config=FILE:key=value,...`."""

from types import SimpleNamespace
from typing import Any

from balpoe_jax.errors import UserError, shown

# The largest whole number in a config file's arguments; settings have narrower ranges.
_LARGEST = 2**31


def parse_arguments(text: str | None, **specification: Any) -> SimpleNamespace:
    """Parses `key=value,...` against typed defaults.

    Args:
        text: Text after the colon of `--config=FILE:text`; None or empty for none.
        **specification: Default of each key, whose type the value must have; a type, for a value
            that is None by default; or a tuple of the valid values, the default first.

    Returns:
        A namespace with every key.

    Raises:
        UserError (a `ValueError`): an unknown key, a key given twice, or a value that is not valid.
    """
    values = {key: _default(given) for key, given in specification.items()}
    seen: set[str] = set()
    for item in filter(None, (text or "").split(",")):
        key, equals, value = item.partition("=")
        if key not in specification:
            raise UserError(
                f"Unknown config argument {shown(key)!r}; choose from {', '.join(specification)}."
            )
        if not equals or key in seen:
            raise UserError(f"Write each config argument once, as key=value; got {shown(item)!r}.")
        seen.add(key)
        values[key] = _parse_value(key, value, specification[key])
    return SimpleNamespace(**values)


def _default(specification: Any) -> Any:
    if isinstance(specification, tuple):
        return specification[0]
    return None if isinstance(specification, type) else specification


def _parse_value(key: str, value: str, default: Any) -> Any:
    choices = default if isinstance(default, tuple) else None
    kind = default if isinstance(default, type) else type(choices[0] if choices else default)
    try:
        parsed = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError) as error:
        wanted = "true or false" if kind is bool else f"of type {kind.__name__}"
        raise UserError(f"Config argument {key} must be {wanted}, got {shown(value)!r}.") from error
    if kind is int and abs(parsed) > _LARGEST:
        raise UserError(f"Config argument {key} must be at most {_LARGEST}, got {shown(value)!r}.")
    if choices and parsed not in choices:
        valid = ", ".join(str(choice) for choice in choices if choice != "")
        raise UserError(f"Config argument {key} must be one of {valid}; got {shown(value)!r}.")
    return parsed
