# SPDX-License-Identifier: Apache-2.0
"""The config files of the package, and the file that `--config` means."""

import os
import re
import runpy
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from balpoe_jax.errors import UserError

_PACKAGE = Path(__file__).parent


def folder() -> Path:
    """The folder of the package's config files.

    Once installed it is `balpoe_jax.configs`; in a checkout, `configs/` next to the package.
    """
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Names of the package's configs, such as `digits_lt`, sorted."""
    return sorted(path.stem for path in folder().glob("[!_]*.py"))


def locate(given: str) -> str:
    """The file that a value of `--config` means, with the arguments that it was given.

    `configs/NAME.py` is that file if it exists, and the package's file of that name otherwise.
    `NAME` is short for it. Any other value, and a name that is unknown, stays as it is.

    Args:
        given: Value of the flag, `FILE.py[:arguments]` or `NAME[:arguments]`.
    """
    file, colon, arguments = given.partition(":")
    if is_name(given):
        file = f"configs/{file}.py"
    if os.path.exists(file):
        return f"{file}{colon}{arguments}"
    named = re.fullmatch(r"configs/(\w+)\.py", os.path.normpath(file))
    if named and named[1] in names():
        return f"{folder() / named[1]}.py{colon}{arguments}"
    return given


def load(given: str) -> ConfigDict:
    """The config that a value of `--config` means.

    Args:
        given: `FILE.py[:arguments]`, or `NAME[:arguments]` for one of the package's.

    Raises:
        UserError (a `ValueError`): a file that does not exist or has no `get_config`, or arguments
            that the file does not take.
    """
    file, _, arguments = locate(given).partition(":")
    if not os.path.isfile(file):
        raise UserError(
            f"There is no config file {file}; give the path of one, or one of {', '.join(names())}."
        )
    found = runpy.run_path(file).get("get_config")
    if not callable(found):
        raise UserError(f"{file} is no config file: it does not define get_config.")
    return found(arguments or None)


def is_name(given: str) -> bool:
    """Whether a value of `--config` is a name, not a path."""
    name = given.partition(":")[0]
    return bool(name) and os.sep not in name and not name.endswith(".py")


def locate_all(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command, with the file in place of each value of `--config`.

    Args:
        arguments: Words of the command line; what follows `--` is left alone.
    """
    located: list[str] = []
    ended = follows = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if follows:
            argument = locate(argument)
        elif equals and not ended and flag in ("-config", "--config"):
            argument = f"{flag}={locate(value)}"
        ended |= argument == "--"
        follows = not ended and argument in ("-config", "--config")
        located.append(argument)
    return located
