# SPDX-License-Identifier: Apache-2.0
"""The page of all settings, `docs/configuration.md`, made from their fields."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from balpoe_jax.config.resolve import AUGMENTATIONS
from balpoe_jax.config.settings import Phase2Settings, Settings
from balpoe_jax.data.settings import AugmentSettings
from balpoe_jax.methods import METHODS, PRESETS
from balpoe_jax.setting import MOST, Section, Setting, described, type_of

PAGE = "docs/configuration.md"

_HEAD = """# Configuration

A config has these fields. `--config.SECTION.FIELD=VALUE` overrides one; a config file sets what
its data set needs. The defaults are the CIFAR recipe. None stands for a default of its own, or for
nothing of the kind, as the field says. Sizes of batches are global. `python -m balpoe_jax.config`
writes this page from the code.
"""

_METHODS = """## method

How the network is trained, and what it predicts. `method=NAME` of a config file sets this section
as a whole; `name` is the class. [The catalogue](methods/index.md) says what each method is.
"""

_COLUMNS = "| field | default | valid | meaning |\n| --- | --- | --- | --- |\n"


def page() -> str:
    """The text of the page."""
    own = dataclasses.fields(Settings)
    parts = [_HEAD, "## Of the whole experiment\n", _table(Settings)]
    for field in own:
        kind, _ = type_of(Settings, field.name)
        if field.name == "method":
            parts += [_METHODS, *_methods()]
        elif field.name in AUGMENTATIONS:
            continue  # described with augment
        elif issubclass(kind, Section):
            parts += [f"## {field.name}\n", _about(field.name, kind), _table(kind, field.default)]
    return "\n".join(parts)


def _about(name: str, kind: type[Section]) -> str:
    first = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
    if kind is AugmentSettings:
        first += (
            " The sections `view2` and `view3` have the same fields, for further views of an image "
            "that some methods need; so have `other_augment`, for half of the images of the first "
            "view, and `test_view`, for the random views from which weights of experts are learnt "
            "(by default as in training). They are absent by default."
        )
    if kind is Phase2Settings:
        first += " It is absent by default."
    return f"{first}\n"


def _methods() -> Iterator[str]:
    for name, kind in METHODS.items():
        presets = [key for key, preset in PRESETS.items() if type(preset.method) is kind]
        if not any(described(kind)):
            yield f"### {name}\n\nNo fields. Methods: {', '.join(presets)}.\n"
            continue
        yield f"### {name}\n\nMethods: {', '.join(presets)}.\n"
        yield _table(kind)


def _table(kind: type[Section], defaults: Any = None) -> str:
    """The fields of a section with the defaults that an experiment has."""
    rows = []
    for field, about in described(kind):
        default = field.default if defaults is None else getattr(defaults, field.name)
        valid = _valid(kind, field.name, about)
        rows.append(f"| `{field.name}` | `{_shown(default)}` | {valid} | {about.about} |")
    return _COLUMNS + "\n".join(rows) + "\n"


def _valid(kind: type[Section], name: str, about: Setting) -> str:
    of, optional = type_of(kind, name)
    if about.choices:
        valid = ", ".join(f"`{choice}`" for choice in about.choices)
    elif of is bool:
        valid = "true, false"
    elif of is str:
        valid = "text"
    else:
        valid = _numbers(of, about)
    return f"{valid}, None" if optional else valid


def _numbers(of: type, about: Setting) -> str:
    least, most = about.least, about.most
    what = "whole number" if of is int else "number"
    if of is tuple:
        what = f"{about.length} numbers" if about.length else "numbers"
    if least == -MOST and most == MOST:
        return what
    if most == MOST:
        return f"{what} from {least:g}"
    return f"{what} from {least:.10g} to {most:.10g}"


def _shown(value: Any) -> str:
    return str(value) if value != "" else '""'
