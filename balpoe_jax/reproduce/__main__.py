# SPDX-License-Identifier: Apache-2.0
"""Runs and collects the rows of a table of the paper: `python -m balpoe_jax.reproduce --table=2`.

Every run is an ordinary `balpoe_jax.main` in a folder of its own below --workdir; what is there is
resumed or, once finished, only collected. Interrupt it at any time and start it again.
"""

import logging
import shlex
import shutil
from collections.abc import Sequence

from absl import flags

from balpoe_jax import cli, files
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import tables
from balpoe_jax.reproduce import job_processes
from balpoe_jax.reproduce.jobs import only, plan, run
from balpoe_jax.reproduce.paper import SCALES
from balpoe_jax.reproduce.scores import collect, result_table, write
from balpoe_jax.reproduce.tables import TABLES
from balpoe_jax.run import record

log = logging.getLogger("balpoe_jax.reproduce")  # not __main__, as which it is started


def define_flags() -> None:
    """Defines --table, --seeds, --only, --scale, --mode, --jobs, --workdir and --data_dir."""
    flags.DEFINE_enum("table", None, list(TABLES), "Table or figure of the paper.")
    flags.DEFINE_list("seeds", ["1", "2", "3"], "Seeds of each row, separated by commas.")
    flags.DEFINE_list("only", [], "Folders of the rows to run, separated by commas; empty for all.")
    flags.DEFINE_enum("scale", "full", list(SCALES), "The paper's setting, or a small version.")
    flags.DEFINE_enum(
        "mode",
        "run",
        ["run", "eval", "print", "collect"],
        "Run what is missing here, --jobs at once, and collect; evaluate again what is done, "
        "and collect; print the commands of what is missing, for a cluster, where one that names a "
        "teacher has to wait for that run; or only collect.",
    )
    flags.DEFINE_integer(
        "jobs",
        1,
        "Runs at once on one device, whose memory they share; what each prints is in its workdir's "
        f"{job_processes.OUTPUT}.",
        lower_bound=1,
    )
    flags.DEFINE_string("workdir", "runs/reproduce", "Folder of all runs and tables.")
    flags.DEFINE_string("data_dir", "", "TFDS folder of the data set; empty for TFDS's own.")
    flags.mark_flag_as_required("table")


def main(arguments: Sequence[str]) -> None:
    """Runs and collects as the flags say."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    values = flags.FLAGS
    table, scale = TABLES[values.table], SCALES[values.scale]
    root = record.locate(values.workdir) / values.scale
    seeds = _parse_seeds(values.seeds)
    jobs = plan(table, scale, seeds, root, values.data_dir)
    wanted = only(jobs, values.only)
    if values.mode == "print":
        for job in wanted:
            if job.state() != "done":
                print(shlex.join(["python", *job.command()]))
        return
    failed = []
    if values.mode in ("run", "eval"):
        failed = run(wanted, values.mode == "eval", values.jobs)
    entries = collect(table, jobs)
    title = f"{table.title} ({scale.note})" if scale.note else table.title
    content = result_table(title, entries)
    name = f"table{values.table}" if values.table[0].isdecimal() else values.table
    write(root, name, content, entries, scale.note)
    width = shutil.get_terminal_size().columns
    log.info("\n%s\n%s\n\nWritten to %s", content.title, tables.as_text(content, width), root)
    if failed:
        file = files.LOG if values.jobs == 1 else job_processes.OUTPUT
        raise UserError(
            f"{len(failed)} of {len(wanted)} runs failed: "
            f"{', '.join(str(job.workdir) for job in failed)}; see the {file} there, and start "
            "this again to go on."
        )


def _parse_seeds(texts: Sequence[str]) -> list[int]:
    if not texts or not all(text.strip().isdecimal() for text in texts):
        raise UserError(f"--seeds must be numbers such as 1,2,3; got {','.join(texts)!r}.")
    seeds = list(dict.fromkeys(int(text) for text in texts))
    if max(seeds) >= 2**31:
        raise UserError(f"--seeds must be below 2**31, got {max(seeds)}.")
    return seeds


if __name__ == "__main__":
    cli.run(define_flags, main)
