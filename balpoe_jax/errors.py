# SPDX-License-Identifier: Apache-2.0
"""The exceptions of a user's mistakes, of passing trouble and of preemption; not of bugs."""

import errno
import signal as signal_module
from typing import Any

_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENFILE, errno.ENOMEM)


class UserError(ValueError):
    """Something that the user can fix: a flag, a config, a data set, a workdir, a checkpoint.

    The message is one sentence: what was expected, what came, what to do. The command line prints
    it without a traceback and exits with code 2; library callers can catch it as a `ValueError`.
    """


class TransientError(UserError):
    """Trouble that may have passed when the same command starts again, such as a full disk.

    The command line prints it in the same way and exits with code 75, so that a scheduler can tell.
    """


class Preempted(Exception):  # noqa: N818
    """The machine is about to be taken away; what there was to save is saved.

    Attributes:
        signal: Signal that told the process; SIGTERM where it told another process.
    """

    def __init__(self, message: str, signal: signal_module.Signals | None = None) -> None:
        super().__init__(message)
        self.signal = signal or signal_module.SIGTERM


def is_transient(error: OSError) -> bool:
    """Whether an error comes from a full disk or silent storage, and not from a wrong path."""
    return isinstance(error, TimeoutError | ConnectionError) or error.errno in _PASSING


def shown(value: Any) -> str:
    """A value as it stands in a message, cut where it is long."""
    try:
        text = str(value)
    except ValueError:  # Python does not print whole numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
