# SPDX-License-Identifier: Apache-2.0
"""The exceptions that mean "the program is not wrong"."""


class UserError(ValueError):
    """Something that the user can mend: a flag, a config, a data set, a workdir, a checkpoint.

    The message is one sentence: what was expected, what came, what to do. The command line prints
    it without a traceback and exits with code 2; library callers can catch it as a `ValueError`.
    """


class Preempted(Exception):  # noqa: N818
    """The machine is about to be taken away; what there was to save is saved."""
