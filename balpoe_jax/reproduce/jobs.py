# SPDX-License-Identifier: Apache-2.0
"""The trainings that a table of the paper needs: planned, and run as ordinary commands.

Every run is a `balpoe_jax.main` in a folder of its own; what is there is resumed.
"""

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from balpoe_jax import config_files, files
from balpoe_jax.config import Settings, resolve
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import schema
from balpoe_jax.reproduce import job_processes
from balpoe_jax.reproduce.paper import Fields, PaperRun, PaperTable, Scale
from balpoe_jax.run import record

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: an experiment at a scale with a seed.

    Attributes:
        experiment: Experiment that is trained.
        seed: Seed of the run.
        workdir: Folder of the run.
        config: Value of `--config`, `FILE:arguments`.
        fields: Fields of the config that are set after the arguments, by dotted name.
        options: Further options.
        teacher: Workdir of the run that it learns from; None for none.
    """

    experiment: PaperRun
    seed: int
    workdir: Path
    config: str
    fields: Fields = ()
    options: tuple[str, ...] = ()
    teacher: Path | None = None

    def command(self) -> list[str]:
        """The arguments of `python`."""
        teacher = [f"--config.method.teacher={self.teacher}"] if self.teacher else []
        return [
            "-m",
            "balpoe_jax.main",
            f"--config={self.config}",
            f"--config.seed={self.seed}",
            f"--workdir={self.workdir}",
            *teacher,
            *(f"--config.{name}={value}" for name, value in self.fields),
            *self.options,
        ]

    def state(self) -> str:
        """The state of the run: "done", "begun" or "to do".

        Raises:
            UserError (a `ValueError`): a run of another config in the folder, or a damaged one.
        """
        if not record.has_config(self.workdir):
            return "to do"
        record.check_same_config(self.workdir, self._settings())
        recorded = schema.load_config(self.workdir)
        last = recorded.total_steps if recorded else None
        # The step alone, so that results which are damaged can be written again.
        step = (files.read_json(self.workdir / files.RESULTS) or {}).get("step")
        return "done" if last is not None and step == last else "begun"

    def _settings(self) -> Settings:
        config = config_files.load(self.config)
        config.update_from_flattened_dict({"seed": self.seed, **dict(self.fields)})
        if self.teacher:
            config.method.teacher = str(self.teacher)
        return resolve(config)


def plan(
    table: PaperTable, scale: Scale, seeds: Sequence[int], root: Path, data_dir: str = ""
) -> list[Job]:
    """Every training that a table needs, each once, seed by seed, teachers before their students.

    Args:
        table: Table of the paper.
        scale: Size at which to run it.
        seeds: Seeds of each row.
        root: Folder of the runs.
        data_dir: TFDS folder; empty for TFDS's own.

    Raises:
        UserError (a `ValueError`): the scale has no version of an experiment.
    """
    configs = config_files.folder()  # the package's, whatever lies where this is started
    experiments = dict.fromkeys(one for row in table.rows for one in row.experiment.with_teacher())
    options = {"data.data_dir": data_dir, "note": scale.note}

    def workdir(experiment: PaperRun, seed: int) -> Path:
        return root / experiment.name / f"seed{seed}"

    return [
        Job(
            experiment,
            seed,
            workdir(experiment, seed),
            f"{configs / experiment.config}:{_arguments(experiment, scale)}",
            experiment.fields_at(scale),
            tuple(f"--config.{field}={value}" for field, value in options.items() if value),
            workdir(experiment.teacher, seed) if experiment.teacher else None,
        )
        for seed in seeds
        for experiment in experiments
    ]


def _arguments(experiment: PaperRun, scale: Scale) -> str:
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


def only(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """The jobs of the experiments that are named, and of their teachers; all if none is named."""
    known = {job.experiment.name: job.experiment for job in jobs}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"The table has no row {unknown[0]!r}; choose from {', '.join(known)}.")
    chosen = {one for name in names or known for one in known[name].with_teacher()}
    return [job for job in jobs if job.experiment in chosen]


def run(jobs: Sequence[Job], again: bool = False, at_once: int = 1) -> list[Job]:
    """Runs the jobs that are not done, and returns those that failed.

    Args:
        jobs: Jobs of a table.
        again: Whether to evaluate the jobs that are done again, in place of running the others.
        at_once: Number of runs at once. With 1 they write to the terminal. With several each writes
            to a file in its workdir, and the students of a teacher that fails count as failed.

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
