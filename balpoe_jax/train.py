# SPDX-License-Identifier: Apache-2.0
"""train(config, workdir): the whole experiment, read from top to bottom."""

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from balpoe_jax import bad_images, non_finite, processes, record
from balpoe_jax.checkpoint import Checkpoints
from balpoe_jax.config import check_config
from balpoe_jax.data import pipeline
from balpoe_jax.errors import UserError
from balpoe_jax.evaluate import Evaluator, Interrupted, publish
from balpoe_jax.experiment import Experiment, build_together, num_parameters
from balpoe_jax.lock import WorkdirLock
from balpoe_jax.parallel import Prefetcher
from balpoe_jax.preemption import PreemptionNotice
from balpoe_jax.profiling import StepProfiler
from balpoe_jax.stages import StagePlan
from balpoe_jax.start_up import StartUp
from balpoe_jax.state import TrainState, all_finite

log = logging.getLogger(__name__)


def train(
    config: ConfigDict,
    workdir: str,
    start_up: StartUp | None = None,
    notice: PreemptionNotice | None = None,
) -> dict[str, Any]:
    """Trains, or goes on training, the experiment of `config` in `workdir`, then evaluates it.

    Args:
        config: see `balpoe_jax.config.default_config`.
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
    check_config(config)
    path = record.open_workdir(workdir)
    record.check_same_config(config.to_dict())
    with record.log_to_file(path), WorkdirLock(path) as lock:
        notice.at_exit(lock.release)
        processes.on_first(partial(_check_workdir, path, config))
        with start_up.measure("devices"):
            jax.local_devices()
        with start_up.measure("data"):
            experiment = build_together(config)
        processes.on_first(partial(_claim, path, experiment))
        return _train(experiment, path, start_up, notice, lock)


def _check_workdir(path: Path, config: ConfigDict) -> None:
    """Refuses a workdir that belongs to another run."""
    if record.is_claimed(path):
        record.check_claim(path, config.to_dict())
    elif any((path / "checkpoints").glob("[0-9]*")):
        raise UserError(
            f"{path} holds checkpoints but no {record.CONFIG} to tell whose they are; choose "
            "another --workdir."
        )


def _claim(path: Path, experiment: Experiment) -> None:
    if not record.is_claimed(path):
        record.claim(path, experiment.config, experiment.resolved(), experiment.data_record())


def _train(
    experiment: Experiment,
    workdir: Path,
    start_up: StartUp,
    notice: PreemptionNotice,
    lock: WorkdirLock,
) -> dict[str, Any]:
    config = experiment.config
    total_steps = experiment.total_steps
    _announce(experiment)

    with Checkpoints(str(workdir / "checkpoints"), config["checkpoint"]["keep"]) as checkpoints:
        # The newest checkpoint, or a fresh state.
        with start_up.measure("restore"):
            state = checkpoints.restore_latest(experiment.abstract_state())
        if state is None:
            with start_up.measure("initialise"):
                state = jax.block_until_ready(experiment.init_state())
        else:
            log.info("Resumed from the checkpoint of step %d", int(state.step))
        log.info("%s parameters", f"{num_parameters(state.params):,}")
        first_step = int(state.step)
        evaluator = Evaluator(experiment)

        with (
            record.MetricWriter(workdir, first_step) as writer,
            StepProfiler(workdir, config["profile"]["steps"]) as profiler,
        ):

            def score_test(state: TrainState, step: int) -> None:
                try:
                    results = evaluator.score_test(state, workdir / "predictions", notice.requested)
                except Interrupted:
                    save_and_stop(state, step)
                if results:
                    writer.write(_test_row(results, step, experiment.epoch_at(step)))

            def save_and_stop(state: TrainState, step: int) -> NoReturn:
                checkpoints.save(state)
                checkpoints.wait()
                raise notice.preempted(f"step {step} is saved")

            if lacks_test(experiment, workdir, first_step):
                score_test(state, first_step)
            trouble = non_finite.NonFiniteSteps(experiment, workdir, first_step)
            progress = Progress(experiment, first_step, trouble)
            for plan in experiment.stages:
                if plan.last_step <= first_step:
                    continue
                start = max(first_step, plan.first_step)
                if start == plan.first_step > 0:
                    log.info("Step %d: the stage %s begins", start, plan.name)
                    state = experiment.begin_stage(plan.index, state)
                train_step = experiment.map_train_step(plan.index)
                with start_up.measure("pipeline"):
                    batches = _make_batches(experiment, plan, start, workdir)
                progress.follow(batches, plan.facts.batch_size)
                for step in range(start + 1, plan.last_step + 1):
                    if step == start + 1:
                        with profiler.annotate(step):
                            state, metrics = _first_step(train_step, state, batches, start_up)
                        if start == first_step:
                            processes.on_first(partial(start_up.finish, workdir, step))
                            notice.work_unsaved()
                            progress.prepare(state)
                    else:
                        with profiler.annotate(step), _explicit_transfers():
                            state, metrics = train_step(state, next(batches))
                    profiler.after(step, metrics)
                    progress.add(metrics)
                    save = _due(experiment, step, config["checkpoint"]["every_epochs"])
                    test = _due(experiment, step, config["eval"]["every_epochs"])
                    last = step == total_steps
                    stop = notice.requested() and not last
                    ends = save or test or stop or step == plan.last_step
                    # Before a checkpoint, so that none is ever written of what is not finite.
                    if step % config["log_every_steps"] == 0 or ends:
                        with _explicit_transfers():
                            row = progress.report(step, state)
                        lock.check()
                        writer.write({**row, **bad_images.count(config, workdir, step)})
                    # Before the test, which may take long: a run ended in it resumes with it.
                    if stop:
                        save_and_stop(state, step)
                    if save or last:
                        checkpoints.save(state)
                    if test and not last:
                        score_test(state, step)
                        progress.restart_clock()
            checkpoints.wait()
            notice.work_saved(f"step {total_steps} is saved")
            results = evaluator.score(state, workdir / "predictions")
            if results and not record.has_test_row(workdir, total_steps):
                writer.write(_test_row(results, total_steps, experiment.epoch_at(total_steps)))
    if results:
        results |= non_finite.summary(config, workdir, total_steps)
        results |= bad_images.count(config, workdir, total_steps)
        publish(results, workdir)
    return results


def _make_batches(
    experiment: Experiment, plan: StagePlan, first_step: int, workdir: Path
) -> Prefetcher:
    """The batches of a stage from a step on, placed on the devices before they are asked for."""
    source = experiment.data.train
    policy = experiment.config["data"]["on_bad_image"]
    made = pipeline.train_batches(
        source,
        experiment.settings[plan.index],
        first_step - plan.first_step,
        plan.last_step - plan.first_step,
        experiment.host,
        bad_images.make_replacements(policy, source, workdir, first_step),
    )
    return Prefetcher(made, experiment.parallel)


def _explicit_transfers() -> contextlib.AbstractContextManager[None]:
    """Batches are placed and metrics fetched explicitly; that anything else passes is a mistake."""
    return jax.transfer_guard("disallow")


def _first_step(
    train_step: Callable[..., Any], state: TrainState, batches: Prefetcher, start_up: StartUp
) -> tuple[TrainState, Any]:
    """The step that waits for the first batch and for the compiler, which fetches constants."""
    with start_up.measure("first batch"):
        batch = next(batches)
    with start_up.measure("compile"):  # the call returns when the step is on its way
        state, metrics = train_step(state, batch)
    with start_up.measure("first step"):
        jax.block_until_ready(metrics)
    return state, metrics


class Progress:
    """Collects the metrics of steps and turns them into rows and lines."""

    def __init__(
        self, experiment: Experiment, first_step: int, trouble: non_finite.NonFiniteSteps
    ) -> None:
        self._experiment = experiment
        self._trouble = trouble
        self._all_finite = jax.jit(all_finite)
        self._first_step = self._last_step = first_step
        self._pending: list[Any] = []
        self._steps_timed, self._seconds_timed = 0, 0.0

    def follow(self, batches: Prefetcher, batch_size: int) -> None:
        """Takes the steps that come now to be made of these batches."""
        self._batches, self._batch_size = batches, batch_size
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out the time since the last report."""
        self._clock, self._waited = time.perf_counter(), self._batches.waited

    def prepare(self, state: TrainState) -> None:
        """Compiles what `report` computes, so that nothing is compiled after the first step."""
        jax.block_until_ready(self._all_finite(state))

    def add(self, metrics: Any) -> None:
        """Takes the metrics of one step, which may still be being computed."""
        self._pending.append(metrics)

    def report(self, step: int, state: TrainState) -> dict[str, Any]:
        """Waits for the steps since the last report, logs a line and returns their row.

        Args:
            step: the last one.
            state: to which it led.

        Raises:
            UserError (a `ValueError`): a step that is not finite, and not to be skipped.
        """
        history = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(self._pending))
        elapsed = time.perf_counter() - self._clock
        # What metrics cannot tell: whether the last update overflowed. Of the ones before it, the
        # losses since would tell.
        history["finite"][-1] &= jax.device_get(self._all_finite(state))
        finite = self._check_finite(history)
        steps = len(self._pending)
        row = {
            "step": step,
            "epoch": self._experiment.epoch_at(step),
            **{name: _mean(values) for name, values in finite.items() if name != "finite"},
            "learning_rate": self._experiment.rate_before(step),
            "images_per_second": steps * self._batch_size / elapsed,
            "data_wait_fraction": (self._batches.waited - self._waited) / elapsed,
        }
        if self._experiment.config["optim"]["skip_non_finite"]:
            row["skipped_steps"] = self._trouble.skipped
        self._log(row, steps, elapsed)
        self._pending, self._last_step = [], step
        self.restart_clock()
        return record.plain(row)

    def _log(self, row: dict[str, Any], steps: int, elapsed: float) -> None:
        if self._last_step > self._first_step:  # the first interval is mostly compilation
            self._steps_timed += steps
            self._seconds_timed += elapsed
        left = self._experiment.total_steps - row["step"]
        per_step = self._seconds_timed / self._steps_timed if self._steps_timed else elapsed / steps
        log.info(
            "step %d/%d  epoch %.1f  loss %.4f  lr %.4g  %.0f images/s  data wait %.0f%%  %s left",
            row["step"],
            self._experiment.total_steps,
            row["epoch"],
            row["loss"],
            row["learning_rate"],
            row["images_per_second"],
            100 * row["data_wait_fraction"],
            _duration(left * per_step),
        )

    def _check_finite(self, history: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The metrics of the steps that are finite; takes down the others."""
        for i in np.flatnonzero(~history["finite"]):
            self._trouble.check(
                self._last_step + 1 + int(i), {name: values[i] for name, values in history.items()}
            )
        return {name: values[history["finite"]] for name, values in history.items()}


def _mean(steps: np.ndarray) -> Any:
    """Over the first axis; not a number where every step was skipped."""
    return steps.mean(axis=0, dtype=np.float64) if len(steps) else np.full(steps.shape[1:], np.nan)


def _announce(experiment: Experiment) -> None:
    config, devices, facts = experiment.config, experiment.parallel, experiment.facts
    log.info(
        "%s, %s with %d experts, taus %s; %d steps, %d an epoch, learning rate %g",
        config["model"]["name"],
        config["method"]["name"],
        len(experiment.taus),
        ", ".join("-" if tau is None else f"{tau:g}" for tau in experiment.taus),
        experiment.total_steps,
        facts.steps_per_epoch,
        config["optim"]["learning_rate"],
    )
    log.info(
        "Batch: %d images in all, %d a host, %d a device; hosts: %d, devices: %d (%s)",
        config["batch_size"],
        config["batch_size"] // devices.num_hosts,
        config["batch_size"] // devices.num_devices,
        devices.num_hosts,
        devices.num_devices,
        devices.mesh.devices.flat[0].device_kind,
    )
    if config["remark"]:
        log.info("Remark: %s", config["remark"])
    taus = [tau for tau in experiment.taus if tau is not None]
    known = len(taus) == len(experiment.taus)
    if known and not np.isclose(mean_tau := float(np.mean(taus)), 1):
        leaning = "frequent" if mean_tau < 1 else "rare"
        log.info(
            "The mean tau is %g, not 1: on a balanced test set the ensemble leans to %s classes",
            mean_tau,
            leaning,
        )


def lacks_test(experiment: Experiment, workdir: Path, step: int) -> bool:
    """Whether the run was stopped before it wrote the scores that are due after `step`."""
    due = _due(experiment, step, experiment.config["eval"]["every_epochs"])
    if not due or not 0 < step < experiment.total_steps:
        return False
    return processes.first_says(lambda: not record.has_test_row(workdir, step))


def _due(experiment: Experiment, step: int, every_epochs: int) -> bool:
    """Whether an epoch ends with a step, and as many epochs do as something is to be done after."""
    epoch = experiment.epoch_at(step)
    return every_epochs > 0 and epoch == int(epoch) and int(epoch) % every_epochs == 0


def _test_row(results: dict[str, Any], step: int, epoch: float) -> dict[str, Any]:
    names = ("top1", "many", "medium", "few", "ece", "mce", "nll")
    scores = {f"test_{name}": results["test"][name] for name in names}
    return {"step": step, "epoch": epoch, **scores}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
