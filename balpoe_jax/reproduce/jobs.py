# SPDX-License-Identifier: Apache-2.0
"""Runs and collects the rows of a table of the paper: `python -m balpoe_jax.reproduce --table=2`.

Every run is an ordinary `balpoe_jax.main` in a folder of its own below --workdir; what is there is
resumed or, once finished, only collected. Interrupt it at any time and start it again.
"""

import dataclasses
import json
import logging
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from balpoe_jax import files
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import schema, tables
from balpoe_jax.reporting.runs import Group, Run, Spread, load_run
from balpoe_jax.reporting.tables import Column, Table
from balpoe_jax.reproduce import job_processes
from balpoe_jax.reproduce.paper import SCALES, TABLES, Experiment, PaperTable, Scale
from balpoe_jax.run import record

log = logging.getLogger("balpoe_jax.reproduce")  # not __main__, as which it is started

_CONFIGS = Path(__file__).parents[2] / "configs"


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: an experiment at a scale with a seed.

    Attributes:
        experiment: what is trained.
        seed: of the run.
        workdir: of the run.
        config: `FILE:arguments` for `--config`.
        options: further ones.
        teacher: workdir of the run that it learns from.
    """

    experiment: Experiment
    seed: int
    workdir: Path
    config: str
    options: tuple[str, ...] = ()
    teacher: Path | None = None

    def command(self) -> list[str]:
        """What `python` is to be called with."""
        teacher = [f"--config.method.teacher={self.teacher}"] if self.teacher else []
        return [
            "-m",
            "balpoe_jax.main",
            f"--config={self.config}",
            f"--config.seed={self.seed}",
            f"--workdir={self.workdir}",
            *teacher,
            *self.options,
        ]

    def state(self) -> str:
        """Whether it is "done", "begun" or "to do".

        Raises:
            UserError (a `ValueError`): a run of another config in the folder, or a damaged one.
        """
        if not record.is_claimed(self.workdir):
            return "to do"
        record.check_claim(self.workdir, self._fields())
        claimed = schema.load_config(self.workdir) or {}
        last = (claimed.get("resolved") or {}).get("total_steps")
        # The step alone, so that results which are damaged can be written again.
        step = (files.read_json(self.workdir / files.RESULTS) or {}).get("step")
        return "done" if last is not None and step == last else "begun"

    def _fields(self) -> dict[str, object]:
        file, _, arguments = self.config.partition(":")
        config = runpy.run_path(file)["get_config"](arguments)
        config.seed = self.seed
        if self.teacher:
            config.method.teacher = str(self.teacher)
        return config.to_dict()


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
    wanted = _only(jobs, values.only)
    if values.mode == "print":
        for job in wanted:
            if job.state() != "done":
                print(shlex.join(["python", *job.command()]))
        return
    failed = []
    if values.mode in ("run", "eval"):
        failed = run(wanted, values.mode == "eval", values.jobs)
    entries = collect(table, jobs)
    title = f"{table.title} ({scale.remark})" if scale.remark else table.title
    content = result_table(title, entries)
    name = f"table{values.table}" if values.table[0].isdecimal() else values.table
    _write(root, name, content, entries, scale.remark)
    width = shutil.get_terminal_size().columns
    log.info("\n%s\n%s\n\nWritten to %s", content.title, tables.as_text(content, width), root)
    if failed:
        file = files.LOG if values.jobs == 1 else job_processes.OUTPUT
        raise UserError(
            f"{len(failed)} of {len(wanted)} runs failed: "
            f"{', '.join(str(job.workdir) for job in failed)}; see the {file} there, and start "
            "this again to go on."
        )


def plan(
    table: PaperTable, scale: Scale, seeds: Sequence[int], root: Path, data_dir: str = ""
) -> list[Job]:
    """Every training that a table needs, each once, seed by seed, teachers before their students.

    Args:
        table: of the paper.
        scale: at which to run it.
        seeds: of each row.
        root: folder of the runs.
        data_dir: TFDS folder, or empty.

    Raises:
        UserError (a `ValueError`): the config files are not there, or the scale has no version of
            an experiment.
    """
    if not _CONFIGS.is_dir():
        raise UserError(
            f"There are no config files in {_CONFIGS}; run this from a checkout of the repository."
        )
    experiments = dict.fromkeys(one for row in table.rows for one in row.experiment.with_teacher())
    options = {"data.data_dir": data_dir, "remark": scale.remark}

    def workdir(experiment: Experiment, seed: int) -> Path:
        return root / experiment.name / f"seed{seed}"

    return [
        Job(
            experiment,
            seed,
            workdir(experiment, seed),
            f"{_CONFIGS / experiment.config}:{_arguments(experiment, scale)}",
            tuple(f"--config.{field}={value}" for field, value in options.items() if value),
            workdir(experiment.teacher, seed) if experiment.teacher else None,
        )
        for seed in seeds
        for experiment in experiments
    ]


def _arguments(experiment: Experiment, scale: Scale) -> str:
    if scale.arguments is None:
        return experiment.arguments
    if experiment.config not in scale.arguments:
        raise UserError(
            f"There is no small version of {experiment.config}; choose --scale=full, or another "
            "--table."
        )
    added = scale.arguments[experiment.config]
    theirs = {argument.partition("=")[0] for argument in added.split(",")}
    own = [
        argument
        for argument in experiment.arguments.split(",")
        if argument.partition("=")[0] not in theirs
    ]
    return ",".join([*own, added])


def run(jobs: Sequence[Job], again: bool = False, at_once: int = 1) -> list[Job]:
    """Runs what is not done and returns what failed.

    Args:
        jobs: of a table.
        again: evaluate again what is done, instead.
        at_once: Number of runs at once. With 1 they write to the terminal; with several each writes
            to a file in its workdir, and a teacher that fails fails its students.

    Raises:
        Preempted: a signal came while several ran, and all have ended.
    """
    states = [job.state() for job in jobs]
    for job, state in zip(jobs, states, strict=True):
        log.info("%-6s %s, seed %d", state, job.experiment.name, job.seed)
    chosen = [job for job, state in zip(jobs, states, strict=True) if (state == "done") == again]
    extra = ["--mode=eval"] if again else []
    if at_once > 1:
        return _run_together(chosen, extra, at_once)
    failed = []
    for i, job in enumerate(chosen, start=1):
        log.info("\n[%d/%d] %s, seed %d", i, len(chosen), job.experiment.name, job.seed)
        if subprocess.run([sys.executable, *job.command(), *extra]).returncode:
            failed.append(job)
    return failed


def _run_together(jobs: Sequence[Job], extra: Sequence[str], at_once: int) -> list[Job]:
    commands = [
        job_processes.Command(
            f"{job.experiment.name}, seed {job.seed}",
            (*job.command(), *extra),
            job.workdir,
            # What is evaluated again has been trained, and needs its teacher no more.
            after=None if extra else job.teacher,
        )
        for job in jobs
    ]
    failed = job_processes.run_together(commands, at_once, _top1)
    return [job for job, command in zip(jobs, commands, strict=True) if command in failed]


def _top1(command: job_processes.Command) -> str:
    results = files.read_json(command.workdir / files.RESULTS) or {}
    test = results.get("test")
    top1 = test.get("top1") if isinstance(test, dict) else None
    return f"top-1 {100 * top1:.1f}%" if isinstance(top1, int | float) else "no top-1"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A score of a row: the paper's and ours, as fractions.

    Attributes:
        method: the row.
        score: which one.
        paper: as published; both None where the paper prints nothing.
        ours: over the seeds; both None when nothing has been run.
        runs: those that are done.
    """

    method: str
    score: str
    paper: Spread
    ours: Spread
    runs: tuple[Run, ...]

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        if self.paper.mean is None or self.ours.mean is None:
            return None
        return self.ours.mean - self.paper.mean

    @property
    def seeds(self) -> str:
        """Those that are done, or that none is."""
        return ",".join(str(run.seed) for run in self.runs) or "not run"


def collect(table: PaperTable, jobs: Sequence[Job]) -> list[Entry]:
    """Every score of a table, ours over the seeds that are done.

    Raises:
        UserError (a `ValueError`): a run whose files are damaged, or of another config, or runs of
            a row that were evaluated with different settings.
    """
    entries = []
    for row in table.rows:
        done = [job for job in jobs if job.experiment == row.experiment and job.state() == "done"]
        runs = tuple(load_run(job.workdir) for job in done)
        _refuse_mixed_settings(runs)
        for score in row.scores:
            published = (
                None if value is None else value / 100 for value in (score.paper, score.paper_std)
            )
            ours = Group(row.method, runs).spread(*score.keys)
            entries.append(Entry(row.method, score.name, Spread(*published), ours, runs))
    return entries


def _refuse_mixed_settings(runs: Sequence[Run]) -> None:
    """Raises UserError unless runs of one experiment were evaluated alike."""
    for run in runs[1:]:
        first, other = runs[0].fields, run.fields
        for name in (name for name in first if name.startswith("eval.")):
            if first[name] != other.get(name):
                raise UserError(
                    f"{runs[0].path} and {run.path} were evaluated with different settings ({name} "
                    f"{first[name]!r} and {other.get(name)!r}); evaluate them alike, with "
                    "--mode=eval."
                )


def result_table(title: str, entries: Sequence[Entry]) -> Table:
    """Three lines for each method: the paper's scores, ours, and the difference."""
    names = tuple(dict.fromkeys(entry.score for entry in entries))
    spread, points = Column("", "spread"), Column("", "points")
    rows: list[tuple[str, list[str]]] = []
    for method in dict.fromkeys(entry.method for entry in entries):
        own = [entry for entry in entries if entry.method == method]
        seeds = own[0].seeds
        rows.append((method, ["" for _ in own]))
        rows.append(("  paper", [spread.show(entry.paper) for entry in own]))
        if not own[0].runs:
            rows.append(("  ours: not run", ["-" for _ in own]))
            continue
        rows.append((f"  ours, seeds {seeds}", [spread.show(entry.ours) for entry in own]))
        if any(entry.difference is not None for entry in own):
            rows.append(("  difference", [points.show(entry.difference) for entry in own]))
    return Table(
        "result",
        title,
        tuple(Column(name) for name in names),
        rows,
        "Percent; mean ± sample standard deviation over seeds, last epoch. A dash is a figure that "
        "the paper does not print, or that has not been measured.",
    )


def entries_table(title: str, entries: Sequence[Entry], root: Path) -> Table:
    """A line for each score, with the logs of its runs below `root`."""
    columns = (
        Column("score"),
        Column("paper", "spread"),
        Column("ours", "spread"),
        Column("difference", "points"),
        Column("seeds"),
        Column("logs"),
    )
    rows = [
        (
            entry.method,
            [
                entry.score,
                entry.paper,
                entry.ours,
                entry.difference,
                entry.seeds,
                " ".join(str(run.path.relative_to(root) / files.LOG) for run in entry.runs),
            ],
        )
        for entry in entries
    ]
    return Table("entries", title, columns, rows)


def _write(root: Path, name: str, content: Table, entries: Sequence[Entry], remark: str) -> None:
    """`NAME.md` for people; `NAME.csv` and `NAME.json` with a line for each score."""
    record.open_workdir(str(root))
    long = entries_table(content.title, entries, root)
    logs = "\n".join(
        f"- {method}: {cells[-1] or 'not run'}" for method, cells in dict(long.rows).items()
    )
    files.write_atomically(root / f"{name}.md", f"{tables.as_markdown(content)}\nLogs:\n\n{logs}\n")
    files.write_atomically(root / f"{name}.csv", tables.as_csv(long, remark))
    written = {
        "title": content.title,
        "remark": remark,
        "rows": [
            {"method": method, **dict(zip((c.name for c in long.columns), cells, strict=True))}
            for method, cells in long.rows
        ],
    }
    files.write_atomically(root / f"{name}.json", json.dumps(files.plain(written), indent=2) + "\n")


def _only(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """Those of the experiments that are named, with their teachers, or all if none is."""
    known = {job.experiment.name: job.experiment for job in jobs}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"The table has no row {unknown[0]!r}; choose from {', '.join(known)}.")
    chosen = {one for name in names or known for one in known[name].with_teacher()}
    return [job for job in jobs if job.experiment in chosen]


def _parse_seeds(texts: Sequence[str]) -> list[int]:
    if not texts or not all(text.strip().isdecimal() for text in texts):
        raise UserError(f"--seeds must be numbers such as 1,2,3; got {','.join(texts)!r}.")
    seeds = list(dict.fromkeys(int(text) for text in texts))
    if max(seeds) >= 2**31:
        raise UserError(f"--seeds must be below 2**31, got {max(seeds)}.")
    return seeds
