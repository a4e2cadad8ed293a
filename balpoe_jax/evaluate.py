# SPDX-License-Identifier: Apache-2.0
"""Restore, predict the test set once, score the predictions."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from ml_collections import ConfigDict

from balpoe_jax import metrics, record, report
from balpoe_jax.checkpoint import Checkpoints
from balpoe_jax.data import pipeline
from balpoe_jax.errors import UserError
from balpoe_jax.experiment import Experiment, build, num_parameters
from balpoe_jax.parallel import AXIS_NAME, Prefetcher
from balpoe_jax.state import TrainState, make_eval_step

log = logging.getLogger(__name__)


def evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Restores the newest checkpoint of a run, evaluates it and writes results and report.

    Args:
        config: the one that the run was trained with.
        workdir: of the run.

    Returns:
        What `results.json` holds.

    Raises:
        UserError (a `ValueError`): no run or no checkpoint there, or one of another config.
    """
    record.check_claim(record.locate(workdir), config.to_dict())
    path = record.open_workdir(workdir)
    with record.log_to_file(path):
        experiment = build(config)
        with Checkpoints(str(path / "checkpoints"), read_only=True) as checkpoints:
            state = checkpoints.restore_latest(experiment.abstract_state())
        if state is None:
            raise UserError(f"There is no checkpoint in {path}; train first, without --mode=eval.")
        log.info("Evaluating the checkpoint of step %d", int(state.step))
        results = Evaluator(experiment).score(state, path / "predictions")
        publish(results, path)
    return results


class Evaluator:
    """Predicts and scores the test set of an experiment; compiles once."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._step = experiment.parallel.map_step(make_eval_step(experiment.model, AXIS_NAME))

    def score(self, state: TrainState, folder: Path) -> dict[str, Any]:
        """Predicts every test example once, into `folder`, and scores the predictions.

        Returns the content of `results.json`: plain values, None where undefined.
        """
        experiment = self._experiment
        predict(self._step, state, experiment, folder)
        expert_logits, labels = load_predictions(folder)
        step = int(state.step)
        scores = score(
            expert_logits,
            labels,
            experiment.data.class_counts,
            experiment.taus,
            experiment.config["eval"]["num_bins"],
            tuple(experiment.config["data"]["shot_thresholds"]),
        )
        results = {
            "step": step,
            "epoch": step // experiment.steps_per_epoch,
            "num_parameters": num_parameters(state.params),
            **scores,
        }
        return record.plain(results)


def publish(results: dict[str, Any], workdir: Path) -> None:
    """Writes `results.json` and the report, and logs the result table."""
    record.write_atomically(workdir / record.RESULTS, json.dumps(results, indent=2) + "\n")
    page = report.write_report(str(workdir))
    log.info("\n%s\n\nReport: %s", report.result_table(results), page)


def predict(step: Any, state: TrainState, experiment: Experiment, folder: Path) -> None:
    """Streams the logits of all experts and the labels to `expert_logits.npy` and `labels.npy`.

    Files are float32 `[E, N, C]` and int32 `[N]`, in the order of the test set, and replace
    earlier ones as a whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    test = experiment.data.test
    shape = (len(experiment.taus), len(test), experiment.data.num_classes)
    # Names of this process's own: a training may be evaluating itself at the same time.
    partial = folder / f".expert_logits.{os.getpid()}.npy"
    partial_labels = folder / f".labels.{os.getpid()}.npy"
    logits = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    labels = np.empty(len(test), np.int32)
    settings = experiment.train_settings
    devices = experiment.parallel.num_devices
    # Rounded up to what the devices can share; what is too much is padding.
    batch_size = -(-experiment.config["eval"]["batch_size"] // devices) * devices
    batches = pipeline.eval_batches(test, batch_size, settings.mean, settings.std)
    seen = 0
    for output in _outputs(step, state, Prefetcher(batches, experiment.parallel)):
        valid = output["mask"]
        end = seen + int(valid.sum())
        logits[:, seen:end] = output["logits"][:, valid]
        labels[seen:end] = output["labels"][valid]
        seen = end
    if seen != len(test):
        raise RuntimeError(f"Predicted {seen} of {len(test)} test examples.")
    logits.flush()
    np.save(partial_labels, labels)
    os.replace(partial_labels, folder / "labels.npy")
    os.replace(partial, folder / "expert_logits.npy")


def load_predictions(folder: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """The arrays that `predict` wrote, the logits memory-mapped."""
    logits = np.load(folder / "expert_logits.npy", mmap_mode="r", allow_pickle=False)
    return logits, np.load(folder / "labels.npy", allow_pickle=False)


def score(
    expert_logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int32],
    class_counts: npt.NDArray[np.int64],
    taus: tuple[float, ...],
    num_bins: int = 15,
    thresholds: tuple[int, int] = metrics.DEFAULT_THRESHOLDS,
) -> dict[str, Any]:
    """Accuracy by shot group and calibration, of the ensemble and of each expert.

    The ensemble is the softmax of the mean of the experts' raw logits: no prior is added.

    Args:
        expert_logits: `[E, N, C]`.
        labels: `[N]`.
        class_counts: `[C]` training counts.
        taus: `[E]`, for the record.
        num_bins: of ECE and MCE.
        thresholds: of the shot groups.

    Returns:
        `class_counts`, `test` and `experts` of `results.json`, fractions in [0, 1], nan where
        undefined.
    """
    ensemble = np.asarray(np.mean(expert_logits, axis=0, dtype=np.float64))
    options = (labels, class_counts, num_bins, thresholds)
    test = _score_logits(ensemble, *options)
    experts = [_score_logits(logits, *options) for logits in expert_logits]
    kept = ("top1", "many", "medium", "few", "ece", "mce")
    return {
        "class_counts": class_counts,
        "test": {**test, "nll": metrics.negative_log_likelihood(ensemble, labels)},
        "experts": [
            {"tau": tau, **{name: expert[name] for name in kept}}
            for tau, expert in zip(taus, experts, strict=True)
        ],
    }


def _score_logits(
    logits: npt.NDArray,
    labels: npt.NDArray[np.int32],
    class_counts: npt.NDArray[np.int64],
    num_bins: int,
    thresholds: tuple[int, int],
) -> dict[str, float]:
    accuracy = metrics.shot_accuracy(logits.argmax(axis=1), labels, class_counts, thresholds)
    calibration = metrics.calibration(metrics.softmax(logits), labels, num_bins)
    return {
        "top1": accuracy.all,
        "many": accuracy.many,
        "medium": accuracy.medium,
        "few": accuracy.few,
        "balanced": accuracy.balanced,
        "ece": calibration.ece,
        "mce": calibration.mce,
    }


def _outputs(step: Any, state: TrainState, batches: Iterable[Any]) -> Iterable[dict[str, Any]]:
    for batch in batches:
        yield jax.device_get(step(state.variables, batch))
