# SPDX-License-Identifier: Apache-2.0
"""train(config, workdir): the whole experiment, read from top to bottom."""

import contextlib
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
    """Trains, or goes on training, an experiment in `workdir`, then evaluates it.

    Args:
        settings: of the experiment, as `balpoe_jax.config.resolve` makes them of a config.
        workdir: folder of the run; a run that is there already is resumed from its newest
            checkpoint, and a finished one only evaluated again.
        start_up: the stopwatch of the command; None to measure from here on.
        notice: of the command, when signals are to stop it; None leaves them to the caller.

    Returns:
        What `results.json` holds; of several processes, the others than the first get nothing.

    Raises:
        UserError (a `ValueError`): input that is not valid, a loss that is not finite, or a workdir
            that another run is using.
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
    """Refuses to go on with other batches than a run began with."""
    if wanted and begun_in and wanted != begun_in:
        raise UserError(
            f"The run in {path} makes its batches on the {begun_in}, and the {wanted} would draw "
            "others; leave out --config.data.pipeline, or choose another --workdir."
        )


def _claim(path: Path, experiment: Experiment) -> None:
    if not record.has_config(path):
        record.write_config(
            path, experiment.settings, experiment.resolved(), experiment.data_record()
        )


def _train(
    experiment: Experiment,
    workdir: Path,
    start_up: StartUp,
    notice: PreemptionNotice,
    lock: WorkdirLock,
) -> dict[str, Any]:
    settings, program = experiment.settings, experiment.program
    total_steps, policy = program.total_steps, settings.data.on_bad_image
    _announce(experiment)

    with Checkpoints(str(workdir / "checkpoints"), settings.checkpoint.keep) as checkpoints:
        # The newest checkpoint, or a fresh state.
        with start_up.measure("restore"):
            state = checkpoints.restore_latest(program.abstract_state())
        if state is None:
            with start_up.measure("initialise"):
                state = jax.block_until_ready(program.init_state())
        else:
            log.info("Resumed from the checkpoint of step %d", int(state.step))
        log.info("%s parameters", f"{num_parameters(state.params):,}")
        first_step = int(state.step)
        constants = program.load_constants() if first_step < total_steps else {}
        evaluator = Evaluator(experiment)

        with (
            metric_writer.MetricWriter(workdir, first_step) as writer,
            StepProfiler(workdir, settings.profile.steps) as profiler,
        ):

            def score_test(state: TrainState, step: int) -> None:
                try:
                    results = evaluator.score_test(state, workdir / "predictions", notice.requested)
                except Interrupted:
                    save_and_stop(state, step)
                if results:
                    writer.write(_test_row(results, step, program.epoch_at(step)))

            def save_and_stop(state: TrainState, step: int) -> NoReturn:
                checkpoints.save(state)
                checkpoints.wait()
                raise notice.preempted(f"step {step} is saved")

            if missing_test_row(experiment, workdir, first_step):
                score_test(state, first_step)
            trouble = non_finite.NonFiniteSteps(
                workdir,
                first_step,
                limit=settings.optim.skip_non_finite,
                batch_indices=experiment.batch_indices,
                learning_rate=program.learning_rate,
                ids=experiment.data.train.ids,
            )
            progress = Progress(program, first_step, trouble)
            for plan in program.phases:
                if plan.last_step <= first_step:
                    continue
                start = max(first_step, plan.first_step)
                if start == plan.first_step > 0:
                    log.info("Step %d: the phase %s begins", start, plan.name)
                    state = program.begin_phase(plan.index, state)
                train_steps = experiment.inputs.map_train_step(
                    program.train_step(plan.index), plan.index, constants
                )
                dispatches = list(_dispatches(experiment, plan, start))
                with start_up.measure("pipeline"):
                    inputs = _make_inputs(experiment, plan, dispatches, workdir)
                progress.follow(inputs, settings.phases[plan.index].batch_size)
                compiled: set[int] = set()
                # Each is one call of a compiled program: a step, or a loop of steps.
                for before, step in dispatches:
                    if before == start:
                        with profiler.annotate(step):
                            state, metrics = _first_dispatch(train_steps, state, inputs, start_up)
                        if start == first_step:
                            multihost.run_on_process_0(partial(start_up.finish, workdir, step))
                            notice.mark_unsaved()
                            progress.prepare(state)
                    else:
                        # A loop of another length is compiled, which fetches constants.
                        known = step - before in compiled
                        with profiler.annotate(step), _explicit_transfers(known):
                            state, metrics = train_steps(state, next(inputs))
                    compiled.add(step - before)
                    profiler.after(step, metrics)
                    save = _is_time(program, step, settings.checkpoint.every_epochs)
                    test = _is_time(program, step, settings.eval.every_epochs)
                    last = step == total_steps
                    stop = notice.requested() and not last
                    ends = save or test or stop or step == plan.last_step
                    every = settings.log_every_steps
                    with _explicit_transfers():
                        progress.add(before, step, metrics)
                        if before // every < step // every or ends:
                            progress.mark(state)
                        # Of the steps that have been made while these are; before a checkpoint,
                        # so that none is ever written of what is not finite, of all.
                        rows = progress.rows(wait=ends)
                    for row in rows:
                        lock.check()
                        writer.write({**row, **bad_images.count(policy, workdir, row["step"])})
                    # Before the test, which may take long: a run ended in it resumes with it.
                    if stop:
                        save_and_stop(state, step)
                    if save or last:
                        checkpoints.save(state)
                    if test and not last:
                        score_test(state, step)
                        progress.restart_clock()
            checkpoints.wait()
            notice.mark_saved(f"step {total_steps} is saved")
            results, predicted = evaluator.score(state, workdir / "predictions")
            if results and not metric_writer.has_test_row(workdir, total_steps):
                writer.write(_test_row(results, total_steps, program.epoch_at(total_steps)))
    if results:
        results |= non_finite.summary(settings.optim.skip_non_finite, workdir, total_steps)
        results |= bad_images.count(policy, workdir, total_steps)
        publish(results, predicted, workdir)
    return results


def _dispatches(experiment: Experiment, plan: PhasePlan, start: int) -> Iterator[tuple[int, int]]:
    """The steps of a phase from `start` on, as they are made together: after one, up to another.

    A dispatch ends where something is to be done, and at multiples of its length otherwise, so that
    an interruption changes nothing.
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
    """Batches are placed and metrics fetched explicitly; that anything else passes is a mistake."""
    return jax.transfer_guard("disallow" if only else "allow")


def _first_dispatch(
    train_steps: Callable[..., Any], state: TrainState, inputs: Prefetcher, start_up: StartUp
) -> tuple[TrainState, Any]:
    """The call that waits for the first inputs and for the compiler, which fetches constants."""
    with start_up.measure("first batch"):
        first = next(inputs)
    with start_up.measure("compile"):  # the call returns when the steps are on their way
        state, metrics = train_steps(state, first)
    with start_up.measure("first step"):
        jax.block_until_ready(metrics)
    return state, metrics


def _announce(experiment: Experiment) -> None:
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
    """Whether an epoch ends with a step, and as many epochs do as something is to be done after."""
    epoch = program.epoch_at(step)
    return every_epochs is not None and epoch == int(epoch) and int(epoch) % every_epochs == 0


def _test_row(results: dict[str, Any], step: int, epoch: float) -> dict[str, Any]:
    names = ("top1", "many", "medium", "few", "ece", "mce", "nll")
    scores = {f"test_{name}": results["test"][name] for name in names}
    return {"step": step, "epoch": epoch, **scores}
