# SPDX-License-Identifier: Apache-2.0
"""The metrics of steps as rows of `metrics.jsonl` and lines of the log."""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from balpoe_jax import files
from balpoe_jax.experiment import label_check
from balpoe_jax.experiment.program import Program
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.parallel import Prefetcher
from balpoe_jax.run import non_finite
from balpoe_jax.step import TrainState, all_finite

log = logging.getLogger(__name__)


class _Made(NamedTuple):
    """Steps that were dispatched, and their metrics, which may still be in the making."""

    steps: int
    metrics: Any


class _Mark(NamedTuple):
    """The end of a row: its last step, what was made for it, and whether its state is finite."""

    step: int
    made: list[_Made]
    finite: jax.Array


class Progress:
    """Collects the metrics of steps and turns them into rows and lines.

    It waits for nothing that is not asked for: while the devices make steps, `rows` fetches the
    metrics of earlier ones.

    Args:
        program: Program that is run.
        first_step: Step after which this start continues.
        trouble: Record of the steps that are not finite.
    """

    def __init__(
        self, program: Program, first_step: int, trouble: non_finite.NonFiniteSteps
    ) -> None:
        self._program = program
        self._trouble = trouble
        self._all_finite = jax.jit(all_finite)
        self._first_step = self._last_step = first_step
        self._step = first_step
        self._made: list[_Made] = []
        self._marks: list[_Mark] = []
        self._steps_timed, self._seconds_timed = 0, 0.0

    def follow(self, inputs: Prefetcher, batch_size: int) -> None:
        """Counts the time that the steps from here on wait for these inputs."""
        self._inputs, self._batch_size = inputs, batch_size
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out the time since the last row."""
        self._clock, self._waited = time.perf_counter(), self._inputs.waited

    def prepare(self, state: TrainState) -> None:
        """Compiles what `mark` computes, so that nothing is compiled after the first step."""
        jax.block_until_ready(self._all_finite(state))

    def add(self, before: int, step: int, metrics: Any) -> None:
        """Adds the metrics of the steps after `before`, up to `step`.

        Args:
            before: Step before the first of them.
            step: Last of them.
            metrics: Metrics of one step, or of several with a leading axis.
        """
        self._step = step
        self._made.append(_Made(step - before, metrics))

    def mark(self, state: TrainState) -> None:
        """Ends a row after the steps that were added so far.

        Args:
            state: State to which they led, before it is given away.
        """
        self._marks.append(_Mark(self._step, self._made, self._all_finite(state)))
        self._made = []

    def rows(self, wait: bool) -> list[dict[str, Any]]:
        """The rows that are due, each logged as a line.

        Args:
            wait: Whether to wait for the newest row, whose steps may have just begun.

        Raises:
            UserError (a `ValueError`): a step that is not finite and may not be skipped.
        """
        due = [mark for mark in self._marks if wait or mark.step < self._step]
        if not due:
            return []
        self._marks = self._marks[len(due) :]
        due = jax.device_get(due)
        # Rows that come at once share the time that their steps took together.
        elapsed = time.perf_counter() - self._clock
        each = elapsed / (due[-1].step - self._last_step)
        waited = (self._inputs.waited - self._waited) / elapsed
        rows = [self._row(mark, each, waited) for mark in due]
        self.restart_clock()
        return rows

    def _row(self, mark: _Mark, seconds: float, waited: float) -> dict[str, Any]:
        """A row, from the seconds of each of its steps and the share that waited for input."""
        history = _history(mark.made)
        # Metrics cannot tell whether the last update overflowed. An earlier one would show in the
        # losses after it.
        history["finite"][-1] &= mark.finite
        if self._last_step == 0:
            self._check_labels(history["expert_losses"][0])
        finite = self._check_finite(history)
        steps = mark.step - self._last_step
        row = {
            "step": mark.step,
            "epoch": self._program.epoch_at(mark.step),
            **{name: _mean(values) for name, values in finite.items() if name != "finite"},
            "learning_rate": self._program.learning_rate(mark.step),
            "images_per_second": self._batch_size / seconds,
            "data_wait_fraction": waited,
        }
        if self._program.settings.optim.skip_non_finite:
            row["skipped_steps"] = self._trouble.skipped
        self._log(row, steps, steps * seconds)
        self._last_step = mark.step
        return files.to_json(row)

    def _log(self, row: dict[str, Any], steps: int, elapsed: float) -> None:
        if self._last_step > self._first_step:  # the first interval is mostly compilation
            self._steps_timed += steps
            self._seconds_timed += elapsed
        left = self._program.total_steps - row["step"]
        per_step = self._seconds_timed / self._steps_timed if self._steps_timed else elapsed / steps
        log.info(
            "step %d/%d  epoch %.1f  loss %.4f  lr %.4g  %.0f images/s  data wait %.0f%%  %s left",
            row["step"],
            self._program.total_steps,
            row["epoch"],
            row["loss"],
            row["learning_rate"],
            row["images_per_second"],
            100 * row["data_wait_fraction"],
            _duration(left * per_step),
        )

    def _check_labels(self, losses: np.ndarray) -> None:
        """Says where the first step's labels are not of the prior; of BalPoE's losses alone."""
        settings = self._program.settings
        if isinstance(settings.method, BalPoE) and settings.data.sampler == "shuffle":
            counts = self._program.context.class_counts
            doubt = label_check.doubt(losses, np.asarray(counts), self._program.taus)
            if doubt:
                log.warning("%s; check the labels of the training images.", doubt)

    def _check_finite(self, history: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The metrics of the steps that are finite; records the others."""
        for i in np.flatnonzero(~history["finite"]):
            self._trouble.check(
                self._last_step + 1 + int(i), {name: values[i] for name, values in history.items()}
            )
        return {name: values[history["finite"]] for name, values in history.items()}


def _mean(steps: np.ndarray) -> Any:
    """The mean over the first axis; not a number where every step was skipped."""
    return steps.mean(axis=0, dtype=np.float64) if len(steps) else np.full(steps.shape[1:], np.nan)


def _history(made: list[_Made]) -> dict[str, np.ndarray]:
    """The metrics of all steps, with a leading axis of steps."""
    each = [jax.tree.map(_with_axis(one), one.metrics) for one in made]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *each)


def _with_axis(made: _Made) -> Callable[[np.ndarray], np.ndarray]:
    """Gives metrics of a single step the axis that those of a loop have."""
    single = np.ndim(made.metrics["loss"]) == 0
    return lambda x: np.array(x)[None] if single else np.array(x)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
