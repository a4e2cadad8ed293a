# SPDX-License-Identifier: Apache-2.0
"""Adjusts and calibrates the logits of any model, and writes the report of an evaluation.

    python -m balpoe_jax.calibrate --logits=LOGITS.npz --counts=COUNTS [--output=DIR]

LOGITS.npz has `logits` [N, C] and `labels` [N], and perhaps `held_out_logits` and
`held_out_labels`. COUNTS are the training examples of each class. Tau, temperature and thresholds
are chosen on held-out rows; DIR gets the page, `results.json`, and `calibrated.npz` with the
probabilities of the test rows.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from absl import flags

from balpoe_jax import cli, files, metrics
from balpoe_jax.data.datasets.listing import read_class_names
from balpoe_jax.data.datasets.test_distributions import TestDistribution
from balpoe_jax.data.long_tail import class_counts as count_classes
from balpoe_jax.errors import UserError
from balpoe_jax.evaluation import posthoc, predictions, scoring
from balpoe_jax.evaluation.logit_files import StoredLogits, hold_out, read_counts, read_logits
from balpoe_jax.evaluation.predictions import Predictions
from balpoe_jax.reporting import report

log = logging.getLogger("balpoe_jax.calibrate")  # not __main__, as which it is started

CALIBRATED = "calibrated.npz"


def define_flags() -> None:
    """Defines --logits, --counts, --output, --classes, --taus, --held_out_share and --seed."""
    flags.DEFINE_string("logits", "", "File of logits and labels, as numpy.savez writes it.")
    flags.DEFINE_string(
        "counts", "", "Training examples of each class: numbers with commas, or a file of them."
    )
    flags.DEFINE_string("output", "runs/calibrated", "Folder of the report.")
    flags.DEFINE_string("classes", "", "File of the classes' names, one a line; empty for numbers.")
    flags.DEFINE_list(
        "taus",
        ["0"],
        "Tau of each model's loss: 0 for plain cross-entropy, 1 for a loss balanced by log-priors.",
    )
    flags.DEFINE_float(
        "held_out_share",
        0.3,
        "Share of each class that is held out where the file has no held-out rows.",
        lower_bound=0.01,
        upper_bound=0.9,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the rows that are held out.")


def main(arguments: Sequence[str]) -> None:
    """Calibrates, following the flags.

    Raises:
        UserError (a `ValueError`): flags or files that do not fit.
    """
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    values = flags.FLAGS
    if not values.logits or not values.counts:
        raise UserError(
            "Expected logits and class counts; give them with --logits=LOGITS.npz and "
            "--counts=COUNTS."
        )
    stored, about = _read(values.logits, values.held_out_share, values.seed)
    num_models, _, num_classes = stored.test.expert_logits.shape
    counts = read_counts(values.counts, num_classes)
    names = read_class_names(values.classes) if values.classes else ()
    if names and len(names) != num_classes:
        raise UserError(
            f"{values.classes} should name the {num_classes} classes of the logits, and names "
            f"{len(names)}."
        )
    taus = _taus(values.taus, num_models)
    page = calibrate(stored, counts, Path(values.output), names=names, taus=taus, about=about)
    log.info("Report: %s", page)


def calibrate(
    stored: StoredLogits,
    counts: npt.NDArray[np.int64],
    output: Path,
    *,
    names: Sequence[str] = (),
    taus: Sequence[float] = (0.0,),
    about: str = "given",
    thresholds: tuple[int, int] = metrics.DEFAULT_THRESHOLDS,
) -> Path:
    """Writes the report of logits that are adjusted and calibrated; returns the page's path.

    Args:
        stored: Test and held-out rows.
        counts: Training examples of each class, int `[C]`.
        output: Folder of the report.
        names: Names of the classes; empty for numbers.
        taus: Tau of each model's loss, `[E]`.
        about: Origin of the held-out rows, in words.
        thresholds: Thresholds of the shot groups.

    Raises:
        UserError (a `ValueError`): no held-out rows, or a folder that cannot be written.
    """
    test, held_out = stored
    if held_out is None:
        raise UserError("Calibrating needs held-out rows; divide the rows with hold_out first.")
    given, given_held_out = _means(test), _means(held_out)
    fitted = posthoc.fit(given_held_out, held_out.labels, counts)
    found = posthoc.variants(given, given_held_out, held_out.labels, counts, fitted)
    parts = [posthoc.adjusted_predictions(rows, counts, fitted.tau) for rows in (test, held_out)]
    scores = scoring.score(
        parts[0],
        counts,
        [tau + fitted.tau for tau in taus],
        thresholds=thresholds,
        held_out=parts[1],
        held_out_description=about,
        targets=[_whole(test.labels, len(counts))],
    )
    calibrated = metrics.softmax(_means(parts[1]) / fitted.temperature)
    chosen = found["adjusted, temperature"][2]
    results = {
        "step": 0,
        "epoch": 0,
        "num_parameters": 0,
        "origin": f"{len(test.labels):,} rows of logits of {_models(len(taus))}",
        **({"class_names": list(names)} if names else {}),
        "posthoc": {
            "tau": fitted.tau,
            "temperature": fitted.temperature,
            "variants": posthoc.score_variants(found, test.labels, counts, thresholds),
            "thresholds": posthoc.score_thresholds(
                calibrated, held_out.labels, chosen, test.labels
            ),
        },
        **scores,
    }
    return _write(output, files.to_json(results), parts[0], chosen)


def _means(rows: Predictions) -> npt.NDArray[np.float64]:
    return np.asarray(rows.ensemble[:], np.float64)


def _write(
    output: Path, results: dict[str, Any], test: Predictions, chosen: npt.NDArray[np.float64]
) -> Path:
    folder = output / predictions.FOLDER
    with files.reports_write_errors(output):
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "expert_logits.npy", test.expert_logits)
        np.save(folder / "labels.npy", test.labels)
        np.savez(output / CALIBRATED, probabilities=chosen.astype(np.float32), labels=test.labels)
    files.write_atomically(output / files.RESULTS, json.dumps(results, indent=2) + "\n")
    page = report.write_report_of(output, results, test)
    width = shutil.get_terminal_size().columns
    log.info("%s\n", report.posthoc_text(results, width))
    return page


def _read(path: str, share: float, seed: int) -> tuple[StoredLogits, str]:
    stored = read_logits(path)
    if stored.held_out is not None:
        return stored, f"{len(stored.held_out.labels):,} rows of the file"
    divided = hold_out(stored.test, share, seed)
    assert divided.held_out is not None
    about = (
        f"{len(divided.held_out.labels):,} rows, {100 * share:g}% of each class, drawn at random"
    )
    log.info("The file has no held-out rows: held out are %s.", about)
    return divided, about


def _whole(labels: npt.NDArray[np.integer], num_classes: int) -> TestDistribution:
    rows = np.arange(len(labels))
    return TestDistribution("test rows", rows, count_classes(labels, num_classes), "whole test set")


def _taus(given: Sequence[str], num_models: int) -> list[float]:
    try:
        taus = [float(value) for value in given]
    except ValueError as error:
        raise UserError(f"--taus should be numbers, got {','.join(given)!r}.") from error
    if len(taus) == 1:
        taus *= num_models
    if len(taus) != num_models or not np.isfinite(taus).all():
        raise UserError(
            f"--taus should have a number for each of the {num_models} models, or one for all; "
            f"got {len(taus)}."
        )
    return taus


def _models(number: int) -> str:
    return "one model" if number == 1 else f"{number} models"


if __name__ == "__main__":
    cli.run(define_flags, main)
