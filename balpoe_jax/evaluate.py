# SPDX-License-Identifier: Apache-2.0
"""Restore, predict the test set once, score the predictions."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from balpoe_jax import files
from balpoe_jax.config import Settings
from balpoe_jax.data.records.sources import Source
from balpoe_jax.errors import UserError
from balpoe_jax.evaluation import expert_weights, pictures, predictions, scoring, statistics
from balpoe_jax.experiment.build import Experiment, build_together
from balpoe_jax.experiment.program import num_parameters
from balpoe_jax.experiment.restoring import restore
from balpoe_jax.reporting import report
from balpoe_jax.run import bad_images, metric_writer, multihost, non_finite, record
from balpoe_jax.step import TrainState

log = logging.getLogger(__name__)

_Batch = TypeVar("_Batch")


def evaluate(settings: Settings, workdir: str) -> dict[str, Any]:
    """Restores the newest checkpoint of a run, evaluates it and writes results and report.

    Args:
        settings: Settings that the run was trained with.
        workdir: Folder of the run.

    Returns:
        Content of `results.json`; nothing in other processes than the first.

    Raises:
        UserError (a `ValueError`): no run there, no checkpoint, or a run of another config.
    """
    there = record.locate(workdir)
    multihost.run_on_process_0(lambda: record.check_same_config(there, settings))
    path = record.open_workdir(workdir)
    record.check_config_everywhere(settings)
    with metric_writer.log_to_file(path):
        # Statistics for averaged weights come from the images as the training saw them.
        begun_in = record.recorded_pipeline(path) if settings.optim.swa is not None else None
        experiment = build_together(settings, begun_in)
        state = restore(experiment.program, path)
        if state is None:
            raise UserError(f"There is no checkpoint in {path}; train first, without --mode=eval.")
        log.info("Evaluating the checkpoint of step %d", int(state.step))
        results, test = Evaluator(experiment).score(state, path / "predictions")
        return publish(results, test, settings, path)


class Interrupted(Exception):  # noqa: N818
    """An evaluation was abandoned on request."""


class Evaluator:
    """Predicts and scores the test set of an experiment; compiles once."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._step = experiment.inputs.map_eval_step(experiment.program.eval_step())

    @cached_property
    def _statistics_step(self) -> Callable[..., Any]:
        return self._experiment.inputs.map_statistics_step(
            self._experiment.program.statistics_step()
        )

    def score_test(
        self, state: TrainState, folder: Path, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Accuracy and calibration on the test set alone, for a look at a running training.

        Args:
            state: State of the training.
            folder: Folder of the predictions.
            interrupted: Function that is called before every batch and says whether to give up.

        Returns:
            `step`, `epoch`, `num_parameters`, `forward_flops`, `class_counts`, `test` and `experts`
            of `results.json`; nothing in other processes than the first.

        Raises:
            Interrupted: `interrupted` said so.
        """
        data = self._experiment.data
        variables = self._variables(state, interrupted)
        test = self._predict(variables, data.test, folder, interrupted=interrupted)
        if test is None:
            return {}
        scores = scoring.score_test(
            test, data.class_counts, self._experiment.program.taus, **self._score_options()
        )
        return self._results(state, scores)

    def score(
        self, state: TrainState, folder: Path
    ) -> tuple[dict[str, Any], predictions.Predictions | None]:
        """Predicts every test and held-out example once, into `folder`, and scores all there is.

        Returns:
            The content of `results.json` (plain values, None where undefined), and the predictions
            of the test set. Nothing and None in other processes than the first.
        """
        experiment, data = self._experiment, self._experiment.data
        evaluation = experiment.settings.eval
        variables = self._variables(state)
        test = self._predict(variables, data.test, folder)
        aggregations = self._aggregate(variables, folder)
        held_out = None
        if data.held_out is not None:
            held_out = self._predict(variables, data.held_out, folder, predictions.HELD_OUT)
        if test is None:
            return {}, None
        pictures.save(folder, data.test, test, data.class_counts)
        if experiment.program.average is not None:
            statistics.save(folder, int(state.step), variables["batch_stats"])
        scores = scoring.score(
            test,
            data.class_counts,
            experiment.program.taus,
            held_out=held_out,
            held_out_description=data.held_out_description,
            targets=experiment.targets,
            prior_strength=evaluation.prior_strength,
            shift_test_level=evaluation.shift_test_level,
            **self._score_options(),
        )
        if aggregations:
            scores["aggregation"] = scoring.score_aggregations(
                test, experiment.targets, aggregations
            )
        return self._results(state, scores), test

    def _variables(
        self, state: TrainState, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """The weights that are evaluated, with statistics of BatchNorm that fit them."""
        about = self._weights(state)
        if about is None or about["average"] == "none":
            return state.variables
        (_, kind), (what, amount) = about.items()
        log.info("Evaluating averaged weights: %s, %s %s", kind, what, amount)
        if "batch_stats" in state.averages:
            return dict(state.averages)
        inputs = self._experiment.inputs
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.batch_stats)
        zeros = self._experiment.program.parallel.replicate(zeros)
        carried = {**state.averages, "batch_stats": zeros}
        for batch in _unless(interrupted, inputs.statistics_batches()):
            carried = self._statistics_step(carried, batch)
        return carried

    def _weights(self, state: TrainState) -> dict[str, Any] | None:
        """What `results.json` says of the evaluated weights; None where nothing is averaged."""
        program = self._experiment.program
        if program.average is None:
            return None
        return program.average.describe(int(state.step), program.context.steps_per_epoch)

    def _aggregate(
        self, variables: dict[str, Any], folder: Path
    ) -> list[expert_weights.Aggregation]:
        """Weights learnt for each target distribution; all processes predict, the first learns."""
        experiment = self._experiment
        evaluation, num_experts = experiment.settings.eval, len(experiment.program.taus)
        if num_experts == 1 or not evaluation.expert_weights_epochs:
            return []
        learnt = [expert_weights.start(num_experts) for _ in experiment.targets]
        for epoch in range(evaluation.expert_weights_epochs):
            prefixes = [f"view{i}_" for i in range(2)]
            try:
                views = [
                    self._predict(
                        variables, experiment.data.test, folder, prefix, view=2 * epoch + i
                    )
                    for i, prefix in enumerate(prefixes)
                ]
                if not multihost.is_first():
                    continue
                first, second = (view.expert_logits for view in views if view is not None)
                learnt = [
                    expert_weights.learn_epoch(
                        before,
                        first,
                        second,
                        evaluation.expert_weights_rate,
                        epoch,
                        target.indices,
                    )
                    for before, target in zip(learnt, experiment.targets, strict=True)
                ]
            finally:
                if multihost.is_first():
                    predictions.remove(folder, *prefixes)
        return learnt if multihost.is_first() else []

    def _predict(
        self,
        variables: dict[str, Any],
        source: Source,
        folder: Path,
        prefix: str = predictions.TEST,
        interrupted: Callable[[], bool] = lambda: False,
        view: int | None = None,
    ) -> predictions.Predictions | None:
        """Predicts every example of `source` once; the logits go to disk as they come.

        With `view`, a number, each is augmented at random. All processes predict, each its part of
        every batch, and the first one alone writes.
        """
        experiment = self._experiment
        shape = (len(experiment.program.taus), len(source), experiment.data.num_classes)
        batches = experiment.inputs.predict(source, experiment.program.eval_batch_size, view)
        outputs = (self._step(variables, batch, source) for batch in _unless(interrupted, batches))
        if not multihost.is_first():
            for output in outputs:
                jax.block_until_ready(output)  # so that it does not run ahead of the first
            return None
        return predictions.stream(folder, prefix, shape, map(jax.device_get, outputs))

    def _score_options(self) -> dict[str, Any]:
        settings = self._experiment.settings
        return {
            "num_bins": settings.eval.num_bins,
            "thresholds": settings.data.shot_thresholds,
        }

    def _results(self, state: TrainState, scores: dict[str, Any]) -> dict[str, Any]:
        step, settings = int(state.step), self._experiment.settings
        weights = self._weights(state)
        results = {
            "step": step,
            "epoch": int(self._experiment.program.epoch_at(step)),
            "num_parameters": num_parameters(state.params),
            "forward_flops": self._experiment.program.forward_flops,
            **({"note": settings.note} if settings.note else {}),
            **({"weights": weights} if weights else {}),
            "settings": {name: getattr(settings.eval, name) for name in record.EVALUATION_SETTINGS},
            **scores,
        }
        return files.to_json(results)


def _unless(interrupted: Callable[[], bool], batches: Iterable[_Batch]) -> Iterator[_Batch]:
    for batch in batches:
        if interrupted():
            raise Interrupted
        yield batch


def publish(
    results: dict[str, Any],
    test: predictions.Predictions | None,
    settings: Settings,
    workdir: Path,
) -> dict[str, Any]:
    """Writes `results.json` and the report, and logs the main tables; in process 0 alone.

    Args:
        results: Results that `Evaluator.score` returned; empty in other processes than the first.
        test: Predictions of the test set, which the report shows.
        settings: Settings of the experiment.
        workdir: Folder of the run.

    Returns:
        Content of `results.json`: the results, and how many steps and images were left out.
    """
    if not results:
        return {}
    step = results["step"]
    results |= non_finite.summary(settings.optim.skip_non_finite, workdir, step)
    results |= bad_images.count(settings.data.on_bad_image, workdir, step)
    files.write_atomically(workdir / files.RESULTS, json.dumps(results, indent=2) + "\n")
    page = report.write_report_of(workdir, results, test)
    width = shutil.get_terminal_size().columns
    log.info("\n%s\n\nReport: %s", report.result_text(results, width), page)
    return results
