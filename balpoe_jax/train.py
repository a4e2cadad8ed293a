# SPDX-License-Identifier: Apache-2.0
"""train(settings, workdir): the whole experiment, read from top to bottom."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from balpoe_jax import files
from balpoe_jax.config import Settings
from balpoe_jax.errors import UserError
from balpoe_jax.evaluate import Evaluator, Interrupted, publish
from balpoe_jax.experiment.build import Experiment, build_together
from balpoe_jax.experiment.phases import PhasePlan
from balpoe_jax.experiment.program import Program, num_parameters
from balpoe_jax.parallel import Prefetcher
from balpoe_jax.progress import Progress
from balpoe_jax.run import bad_images, metric_writer, multihost, non_finite, record
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.run.lock import WorkdirLock
from balpoe_jax.run.preemption import PreemptionNotice
from balpoe_jax.run.profiling import StepProfiler
from balpoe_jax.run.startup_times import StartUp
from balpoe_jax.step import TrainState

log = logging.getLogger(__name__)


def train(
    settings: Settings,
    workdir: str,
    start_up: StartUp | None = None,
    notice: PreemptionNotice | None = None,
) -> dict[str, Any]:
    """Trains an experiment in `workdir`, or resumes its training, then evaluates it.

    Args:
        settings: Settings of the experiment, as `balpoe_jax.config.resolve` makes them of a config.
        workdir: Folder of the run; a run that is there already is resumed from its newest
            checkpoint, and a finished one is only evaluated again.
        start_up: Stopwatch of the command; None to measure from here on.
        notice: Notice of the command, if signals are to stop it; None leaves them to the caller.

    Returns:
        Content of `results.json`; nothing in other processes than the first.

    Raises:
        UserError (a `ValueError`): input that is not valid, a loss that is not finite, or a workdir
            that another run uses.
        Preempted: a signal came, and a checkpoint was saved.
    """
    start_up, notice = start_up or StartUp(), notice or PreemptionNotice()
    path = record.open_workdir(workdir)
    record.check_config_everywhere(settings)
    with metric_writer.log_to_file(path), WorkdirLock(path) as lock:
        notice.at_exit(lock.release)
        multihost.run_on_process_0(partial(_check_workdir, path, settings))
        with start_up.measure("devices"):
            jax.local_devices()
        begun_in = record.recorded_pipeline(path)
        _check_pipeline(path, settings.data.pipeline, begun_in)
        with start_up.measure("data"):
            experiment = build_together(settings, begun_in)
        multihost.run_on_process_0(partial(_claim, path, experiment))
        return _train(experiment, path, start_up, notice, lock)


def _check_workdir(path: Path, settings: Settings) -> None:
    """Refuses a workdir that belongs to another run."""
    if record.has_config(path):
        record.check_same_config(path, settings)
    elif any((path / "checkpoints").glob("[0-9]*")):
        raise UserError(
            f"{path} holds checkpoints but no {files.CONFIG} to tell whose they are; choose "
            "another --workdir."
        )


def _check_pipeline(path: Path, wanted: str | None, begun_in: str | None) -> None:
    """Refuses to resume a run with other batches than it began with."""
    if wanted and begun_in and wanted != begun_in:
        raise UserError(
            f"The run in {path} makes its batches on the {begun_in}, and the {wanted} would draw "
            "others; leave out --config.data.pipeline, or choose another --workdir."
        )


def _claim(path: Path, experiment: Experiment) -> None:
    """Writes `config.json`; of a run that was begun before it must name the same images."""
    about = experiment.data_record()
    if record.has_config(path):
        record.check_same_images(path, about)
    else:
        record.write_config(path, experiment.settings, experiment.resolved(), about)


def _train(
    experiment: Experiment,
    workdir: Path,
    start_up: StartUp,
    notice: PreemptionNotice,
    lock: WorkdirLock,
) -> dict[str, Any]:
    settings, program = experiment.settings, experiment.program
    total_steps = program.total_steps
    _announce(experiment)

    with Checkpoints(str(workdir / "checkpoints"), settings.checkpoint.keep) as checkpoints:
        state = _restore_or_initialise(program, checkpoints, start_up)
        first_step = int(state.step)
        constants = program.load_constants() if first_step < total_steps else {}
        evaluator = Evaluator(experiment)

        with (
            metric_writer.MetricWriter(workdir, first_step) as writer,
            StepProfiler(workdir, settings.profile.steps) as profiler,
        ):
            training = _Training(
                experiment=experiment,
                workdir=workdir,
                first_step=first_step,
                checkpoints=checkpoints,
                evaluator=evaluator,
                writer=writer,
                profiler=profiler,
                start_up=start_up,
                notice=notice,
                lock=lock,
            )
            if missing_test_row(experiment, workdir, first_step):
                training.score_test(state, first_step)
            progress = training.start_progress()
            for plan in program.phases:
                if plan.last_step <= first_step:
                    continue
                if first_step <= plan.first_step > 0:
                    log.info("Step %d: the phase %s begins", plan.first_step, plan.name)
                    state = program.begin_phase(plan.index, state)
                state = training.make_phase(plan, state, constants, progress)
            checkpoints.wait()
            notice.mark_saved(f"step {total_steps} is saved")
            results, predicted = evaluator.score(state, workdir / "predictions")
            if results and not metric_writer.has_test_row(workdir, total_steps):
                writer.write(_test_row(results, total_steps, program.epoch_at(total_steps)))
    return publish(results, predicted, settings, workdir)


def _restore_or_initialise(
    program: Program, checkpoints: Checkpoints, start_up: StartUp
) -> TrainState:
    """The state of the newest checkpoint, or a fresh one."""
    with start_up.measure("restore"):
        state = checkpoints.restore_latest(program.abstract_state())
    if state is None:
        with start_up.measure("initialise"):
            state = jax.block_until_ready(program.init_state(program.read_pretrained()))
    else:
        log.info("Resumed from the checkpoint of step %d", int(state.step))
    log.info("%s parameters", f"{num_parameters(state.params):,}")
    return state


@dataclasses.dataclass(frozen=True)
class _Training:
    """What one start of a training works with, and what it does between its start and its end.

    Attributes:
        experiment: Experiment that is trained.
        workdir: Folder of the run.
        first_step: Step after which this start continues.
        checkpoints, evaluator, writer, profiler: Those of this start, open.
        start_up, notice, lock: Those of the command, as for `train`.
    """

    experiment: Experiment
    workdir: Path
    first_step: int
    checkpoints: Checkpoints
    evaluator: Evaluator
    writer: metric_writer.MetricWriter
    profiler: StepProfiler
    start_up: StartUp
    notice: PreemptionNotice
    lock: WorkdirLock

    def start_progress(self) -> Progress:
        """What collects the metrics of this start's steps."""
        experiment, program = self.experiment, self.experiment.program
        trouble = non_finite.NonFiniteSteps(
            self.workdir,
            self.first_step,
            limit=experiment.settings.optim.skip_non_finite,
            batch_indices=experiment.batch_indices,
            learning_rate=program.learning_rate,
            ids=experiment.data.train.ids,
        )
        return Progress(program, self.first_step, trouble)

    def make_phase(
        self, plan: PhasePlan, state: TrainState, constants: dict[str, Any], progress: Progress
    ) -> TrainState:
        """Makes the steps of a phase that are left, and returns the state to which they lead.

        Args:
            plan: Phase to make.
            state: State before its first step that is left, which is given away.
            constants: Constants of the step, see `Program.load_constants`.
            progress: Collector of the steps' metrics.
        """
        experiment, start = self.experiment, max(self.first_step, plan.first_step)
        train_steps = experiment.inputs.map_train_step(
            experiment.program.train_step(plan.index), plan.index, constants
        )
        dispatches = list(_dispatches(experiment, plan, start))
        with self.start_up.measure("pipeline"):
            inputs = _make_inputs(experiment, plan, dispatches, self.workdir)
        batch_size = experiment.settings.phases[plan.index].batch_size  # of images, not of rows
        progress.follow(inputs, batch_size)
        compiled: set[int] = set()
        # Each is one call of a compiled program: a step, or a loop of steps.
        for before, step in dispatches:
            if before == start:
                with self.profiler.annotate(step):
                    state, metrics = _first_dispatch(train_steps, state, inputs, self.start_up)
                if start == self.first_step:
                    finish = partial(self.start_up.finish, self.workdir, step)
                    multihost.run_on_process_0(finish)
                    self.notice.mark_unsaved()
                    progress.prepare(state)
            else:
                # A loop of another length is compiled, which fetches constants.
                known = step - before in compiled
                with self.profiler.annotate(step), _explicit_transfers(known):
                    state, metrics = train_steps(state, next(inputs))
            compiled.add(step - before)
            self.profiler.after(step, metrics)
            progress.add(before, step, metrics)
            self._finish_dispatch(plan, before, step, state, progress)
        return state

    def _finish_dispatch(
        self, plan: PhasePlan, before: int, step: int, state: TrainState, progress: Progress
    ) -> None:
        """Writes the rows that are due after a dispatch, and saves, tests or stops if it is time.

        Args:
            plan: Phase that the dispatch belongs to.
            before: Step before the dispatch.
            step: Last step of the dispatch.
            state: State to which it led.
            progress: Collector of the steps' metrics, these among them.
        """
        settings, program = self.experiment.settings, self.experiment.program
        save = _is_time(program, step, settings.checkpoint.every_epochs)
        test = _is_time(program, step, settings.eval.every_epochs)
        last = step == program.total_steps
        stop = self.notice.requested() and not last
        ends = save or test or stop or step == plan.last_step
        every = settings.log_every_steps
        with _explicit_transfers():
            if before // every < step // every or ends:
                progress.mark(state)
            # The rows of earlier steps, while the devices make these. Before a checkpoint or a
            # test the rows of all steps, so that no state is saved that is not finite.
            rows = progress.rows(wait=ends)
        for row in rows:
            self.lock.check()
            bad = bad_images.count(settings.data.on_bad_image, self.workdir, row["step"])
            self.writer.write({**row, **bad})
        # Before the test, which may take long: a run that is ended in it resumes with it.
        if stop:
            self._save_and_stop(state, step)
        if save or last:
            self.checkpoints.save(state)
        if test and not last:
            self.score_test(state, step)
            progress.restart_clock()

    def score_test(self, state: TrainState, step: int) -> None:
        """Writes a row with the scores of the test set; stops if a signal comes meanwhile."""
        try:
            results = self.evaluator.score_test(
                state, self.workdir / "predictions", self.notice.requested
            )
        except Interrupted:
            self._save_and_stop(state, step)
        if results:
            self.writer.write(_test_row(results, step, self.experiment.program.epoch_at(step)))

    def _save_and_stop(self, state: TrainState, step: int) -> NoReturn:
        self.checkpoints.save(state)
        self.checkpoints.wait()
        raise self.notice.preempted(f"step {step} is saved")


def _dispatches(experiment: Experiment, plan: PhasePlan, start: int) -> Iterator[tuple[int, int]]:
    """The dispatches of a phase from `start` on, each as the step before it and its last step.

    A dispatch ends where something is to be done. Otherwise it ends at a multiple of its length, so
    that an interruption changes nothing.
    """
    settings, program = experiment.settings, experiment.program
    length = experiment.inputs.steps_per_dispatch(plan.index)
    first, last = settings.profile.steps or (0, 0)
    before = start
    for step in range(start + 1, plan.last_step + 1):
        if (
            (step - plan.first_step) % length == 0
            or step == plan.last_step
            or step in (first - 1, last)
            or _is_time(program, step, settings.checkpoint.every_epochs)
            or _is_time(program, step, settings.eval.every_epochs)
        ):
            yield before, step
            before = step


def _make_inputs(
    experiment: Experiment, plan: PhasePlan, dispatches: list[tuple[int, int]], workdir: Path
) -> Prefetcher:
    """The inputs of a phase, placed on the devices before they are asked for."""
    policy, start = experiment.settings.data.on_bad_image, dispatches[0][0]
    replacements = bad_images.make_replacements(policy, experiment.data.train, workdir, start)
    within = [(before - plan.first_step, step - plan.first_step) for before, step in dispatches]
    return experiment.inputs.train(plan.index, within, replacements)


def _explicit_transfers(only: bool = True) -> contextlib.AbstractContextManager[None]:
    """A context that forbids implicit transfers: any but of batches and metrics is a mistake.

    Args:
        only: Whether it forbids them; otherwise it does nothing.
    """
    return jax.transfer_guard("disallow" if only else "allow")


def _first_dispatch(
    train_steps: Callable[..., Any], state: TrainState, inputs: Prefetcher, start_up: StartUp
) -> tuple[TrainState, Any]:
    """Makes a phase's first dispatch, which waits for inputs and for the compiler, and times it.

    The compiler fetches constants, so implicit transfers are allowed.
    """
    with start_up.measure("first batch"):
        first = next(inputs)
    with start_up.measure("compile"):  # the call returns when the steps are on their way
        state, metrics = train_steps(state, first)
    with start_up.measure("first step"):
        jax.block_until_ready(metrics)
    return state, metrics


def _announce(experiment: Experiment) -> None:
    """Logs what is trained, on which devices, and a mean tau that favours some classes."""
    settings, program = experiment.settings, experiment.program
    devices, taus = program.parallel, [tau for tau in program.taus if tau is not None]
    log.info(
        "%s, %s with %d experts, taus %s; %d steps, %d an epoch, learning rate %g",
        settings.model.name,
        settings.method.name,
        len(program.taus),
        ", ".join("-" if tau is None else f"{tau:g}" for tau in program.taus),
        program.total_steps,
        program.context.steps_per_epoch,
        settings.optim.learning_rate,
    )
    log.info(
        "Batch: %d images in all, %d a host, %d a device; hosts: %d, devices: %d (%s)",
        settings.batch_size,
        settings.batch_size // devices.num_hosts,
        settings.batch_size // devices.num_devices,
        devices.num_hosts,
        devices.num_devices,
        devices.mesh.devices.flat[0].device_kind,
    )
    if settings.note:
        log.info("Note: %s", settings.note)
    known = len(taus) == len(program.taus)
    if known and not np.isclose(mean_tau := float(np.mean(taus)), 1):
        leaning = "frequent" if mean_tau < 1 else "rare"
        log.info(
            "The mean tau is %g, not 1: on a balanced test set the ensemble leans to %s classes",
            mean_tau,
            leaning,
        )


def missing_test_row(experiment: Experiment, workdir: Path, step: int) -> bool:
    """Whether the run was stopped before it wrote the scores that are due after `step`."""
    due = _is_time(experiment.program, step, experiment.settings.eval.every_epochs)
    if not due or not 0 < step < experiment.program.total_steps:
        return False
    return multihost.broadcast_bool(lambda: not metric_writer.has_test_row(workdir, step))


def _is_time(program: Program, step: int, every_epochs: int | None) -> bool:
    """Whether a step ends an epoch whose number is a multiple of `every_epochs`; None is never."""
    epoch = program.epoch_at(step)
    return every_epochs is not None and epoch == int(epoch) and int(epoch) % every_epochs == 0


def _test_row(results: dict[str, Any], step: int, epoch: float) -> dict[str, Any]:
    names = ("top1", "many", "medium", "few", "ece", "mce", "nll")
    scores = {f"test_{name}": results["test"][name] for name in names}
    return {"step": step, "epoch": epoch, **scores}
