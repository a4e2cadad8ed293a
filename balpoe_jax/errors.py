# SPDX-License-Identifier: Apache-2.0
"""The exceptions that mean "the program is not wrong"."""

import errno
import signal as signal_module
from typing import Any

_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENFILE, errno.ENOMEM)


class UserError(ValueError):
    """Something that the user can mend: a flag, a config, a data set, a workdir, a checkpoint.

    The message is one sentence: what was expected, what came, what to do. The command line prints
    it without a traceback and exits with code 2; library callers can catch it as a `ValueError`.
    """


class TransientError(UserError):
    """What may have passed when the same command is started again: a full disk, a host not there.

    The command line prints it likewise and exits with code 75, so that whoever restarts can tell.
    """


class Preempted(Exception):  # noqa: N818
    """The machine is about to be taken away; what there was to save is saved.

    Attributes:
        signal: by which the process was told; SIGTERM where another process was.
    """

    def __init__(self, message: str, signal: signal_module.Signals | None = None) -> None:
        super().__init__(message)
        self.signal = signal or signal_module.SIGTERM


def is_transient(error: OSError) -> bool:
    """Whether it is of a full disk or of storage that does not answer, and not of a wrong path."""
    return isinstance(error, TimeoutError | ConnectionError) or error.errno in _PASSING


def shown(value: Any) -> str:
    """A value as it stands in a message, cut where it is long."""
    try:
        text = str(value)
    except ValueError:  # Python does not print whole numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
