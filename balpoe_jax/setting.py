# SPDX-License-Identifier: Apache-2.0
"""A setting: one field of a frozen dataclass, with its default, range and sentence in one place.

The config's sections, their checks and `docs/configuration.md` are derived from these fields.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from balpoe_jax.errors import UserError, shown

_METADATA = "balpoe_jax.setting"
# The end of a range without one: no setting beyond it could be meant, or be run.
MOST = 1e9


class Setting(NamedTuple):
    """The description of a field.

    Attributes:
        about: Sentence that begins with a noun.
        least, most: Ends of the valid range, both included; of a tuple, of its members.
        choices: Valid values; empty where a range says which.
        length: Number of a tuple's members; None for any.
        scales: Whether it counts epochs, and is scaled with the length of a training.
    """

    about: str
    least: float = -MOST
    most: float = MOST
    choices: tuple[Any, ...] = ()
    length: int | None = None
    scales: bool = False

    @property
    def range(self) -> str:
        """The valid values in words."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return f"from {self.least:.10g} to {self.most:.10g}"


def setting(
    default: Any,
    about: str,
    least: float = -MOST,
    most: float = MOST,
    *,
    choices: Sequence[Any] = (),
    length: int | None = None,
    scales: bool = False,
) -> Any:
    """A field of a frozen dataclass.

    Args:
        default: Default value; None is valid where the field's type says so.
        about: Sentence that begins with a noun, for the reference page; with the unit if any.
        least: Least valid value of a number, or of each number of a tuple.
        most: Greatest valid value.
        choices: Valid values in place of a range.
        length: Number of a tuple's members; None for any.
        scales: Whether the field counts epochs of a training, and is scaled with its length.
    """
    described = Setting(about, least, most, tuple(choices), length, scales)
    return dataclasses.field(default=default, metadata={_METADATA: described})


def described(section: type) -> Iterator[tuple[dataclasses.Field[Any], Setting]]:
    """The settings of a dataclass in order: each field with its description."""
    for field in dataclasses.fields(section):
        if _METADATA in field.metadata:
            yield field, field.metadata[_METADATA]


class Section:
    """The base of a frozen dataclass of settings, which refuses values outside of their ranges.

    Attributes:
        path: Dotted place of the section in a config, with a dot at its end.
    """

    path: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Checks all settings.

        Raises:
            UserError (a `ValueError`): a value that is not valid, with the field's name.
        """
        for field, about in described(type(self)):
            value, (_, optional) = getattr(self, field.name), type_of(type(self), field.name)
            if not (optional and value is None):
                name = f"config.{self.path}{field.name}"
                _check(name, value, field.default, about, ", or None" if optional else "")


def _check(name: str, value: Any, default: Any, about: Setting, alternative: str) -> None:
    if about.choices:
        if value not in about.choices:
            raise UserError(f"{name} must be {about.range}{alternative}; got {shown(value)!r}.")
    elif isinstance(value, tuple | list):
        _check_members(name, value, about)
    elif _is_number(value):
        if not about.least <= value <= about.most:  # which NaN is not either
            raise UserError(f"{name} must be {about.range}{alternative}, got {shown(value)}.")
    elif _is_number(default) or isinstance(default, tuple):
        wanted = "numbers" if isinstance(default, tuple) else "a number"
        raise UserError(f"{name} must be {wanted}, got {shown(value)!r}.")


def _check_members(name: str, values: Sequence[Any], about: Setting) -> None:
    if not all(map(_is_number, values)) or about.length not in (None, len(values)):
        wanted = "numbers" if about.length is None else f"{about.length} numbers"
        raise UserError(f"{name} must be {wanted}, such as (1,2,3); got {shown(values)}.")
    if not all(about.least <= value <= about.most for value in values):
        raise UserError(f"{name} must be {about.range}, each of them; got {shown(values)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Section = TypeVar("_Section", bound=Section)


def make_section(kind: type[_Section], values: Mapping[str, Any], path: str = "") -> _Section:
    """The section that a config's values make.

    Args:
        kind: Class of the section.
        values: Values by field; lists become tuples.
        path: Place in the config, with a dot at its end, if it is not the class's own.

    Raises:
        UserError (a `ValueError`): an unknown field, or a value that is not valid.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    path = path or kind.path
    if unknown := sorted(set(values) - set(names)):
        raise UserError(
            f"Unknown config field {shown(path + unknown[0])}; config.{path.rstrip('.')} has "
            f"{', '.join(names)}."
        )
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return kind(**plain)
    except UserError as error:
        raise UserError(str(error).replace(f"config.{kind.path}", f"config.{path}")) from error


def type_of(kind: type, name: str) -> tuple[type, bool]:
    """The type of a field, without its parameters, and whether it may be None."""
    return _types(kind)[name]


@functools.cache
def _types(kind: Any) -> dict[str, tuple[type, bool]]:
    return {name: _split(hint) for name, hint in typing.get_type_hints(kind).items()}


def _split(hint: Any) -> tuple[type, bool]:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    given = [option for option in options if option is not type(None)]
    return typing.get_origin(given[0]) or given[0], len(given) < len(options)
