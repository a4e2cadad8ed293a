# SPDX-License-Identifier: Apache-2.0
"""The exceptions that mean "the program is not wrong"."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """Something that the user can mend: a flag, a config, a data set, a workdir, a checkpoint.

    The message is one sentence: what was expected, what came, what to do. The command line prints
    it without a traceback and exits with code 2; library callers can catch it as a `ValueError`.
    """


class Preempted(Exception):  # noqa: N818
    """The machine is about to be taken away; what there was to save is saved."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write a file or folder into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); move away what is in its "
            "place, make room, or choose another folder."
        ) from error
