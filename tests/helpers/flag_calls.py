# SPDX-License-Identifier: Apache-2.0
"""Calls a command in the test's own process, with flags of its own."""

import functools
from types import ModuleType

import pytest
from absl import flags

_KINDS = ("string", "list", "float", "integer", "bool")


def call(module: ModuleType, *arguments: str) -> None:
    """Defines the module's flags, parses the arguments and calls its `main`.

    Raises:
        flags.Error: flags that are not the command's.
    """
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        for kind in _KINDS:
            name = f"DEFINE_{kind}"
            patch.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=values))
        patch.setattr(flags, "FLAGS", values)
        module.define_flags()
        module.main(values(["command", *arguments]))
