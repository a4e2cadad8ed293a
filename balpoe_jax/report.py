# SPDX-License-Identifier: Apache-2.0
"""Writes the report of a finished run again: `python -m balpoe_jax.report DIR`.

Everything is read from the files in DIR, the workdir of a run that was evaluated. Nothing is
computed on a device, and the results stay as they are.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from balpoe_jax import cli
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import schema
from balpoe_jax.reporting.report import result_text, write_report

log = logging.getLogger("balpoe_jax.report")  # not __main__, as which it is started


def define_flags() -> None:
    """Defines none: the folder is the only argument."""


def main(arguments: Sequence[str]) -> None:
    """Writes the report of the run that the argument names, and shows its main tables.

    Raises:
        UserError (a `ValueError`): not one folder, or one whose results are missing or damaged.
    """
    if len(arguments) != 2:
        raise UserError(
            f"Expected the folder of one run, got {len(arguments) - 1} arguments; "
            "call python -m balpoe_jax.report DIR."
        )
    page = write_report(arguments[1])
    results = schema.load_results(Path(arguments[1])) or {}
    width = shutil.get_terminal_size().columns
    log.info("%s\n\nReport: %s", result_text(results, width), page)


if __name__ == "__main__":
    cli.run(define_flags, main)
