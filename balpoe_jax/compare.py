# SPDX-License-Identifier: Apache-2.0
"""Results of several runs side by side: `python -m balpoe_jax.compare DIR DIR ...`.

Runs that differ in nothing but the seed are one row, mean and standard deviation; further rows are
compared with the first.
"""

import logging
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from balpoe_jax import cli
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import tables
from balpoe_jax.reporting.comparison import compare, shared_note, write
from balpoe_jax.reporting.runs import find_runs, group_runs

log = logging.getLogger("balpoe_jax.compare")  # not __main__, as which it is started


def define_flags() -> None:
    """Defines --output."""
    flags.DEFINE_string(
        "output", "", "Folder for the tables as JSON, CSV and Markdown, and a page with figures."
    )


def main(arguments: Sequence[str]) -> None:
    """Compares the runs that the arguments name."""
    if len(arguments) < 2:
        raise UserError("Name the folders of the runs: python -m balpoe_jax.compare DIR DIR ...")
    groups = group_runs(find_runs(arguments[1:]))
    content = compare(groups)
    width = shutil.get_terminal_size().columns
    note = shared_note(groups)
    if note:
        log.info("%s\n", textwrap.fill(f"Note: {note}", width))
    for table in content:
        log.info("%s\n%s\n", table.title, tables.as_text(table, width))
    if flags.FLAGS.output:
        log.info("Written to %s", write(Path(flags.FLAGS.output), groups, content))


if __name__ == "__main__":
    cli.run(define_flags, main)
