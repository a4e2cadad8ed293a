# SPDX-License-Identifier: Apache-2.0
"""Predicts images with a trained run: `python -m balpoe_jax.predict --workdir=RUN PATH...`.

A PATH is an image, a folder of images, a pattern such as 'photos/*.jpg', or `-` for a list on
standard input, a path a line. The output has a row for each image, in order: its path, the most
probable classes with their calibrated probabilities, and `ok` or the reason why it cannot be read.
"""

import contextlib
import csv
import glob
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from absl import flags

from balpoe_jax import cli
from balpoe_jax.data.records.photographs import SUFFIXES
from balpoe_jax.errors import UserError
from balpoe_jax.evaluation.abstention import find_threshold
from balpoe_jax.evaluation.priors import concentration, estimate_prior
from balpoe_jax.files import reports_write_errors
from balpoe_jax.metrics import softmax
from balpoe_jax.predictor import Predicted, Predictor, load
from balpoe_jax.progress_bar import ProgressBar

log = logging.getLogger("balpoe_jax.predict")  # not __main__, as which it is started


OK, UNSURE = "ok", "unsure"

# Names of files need not be text: their bytes are written as they are.
_NAMES = "surrogateescape"

# Images from which a class distribution is estimated at most.
_ESTIMATED_FROM = 10_000

Adjust = Callable[[Predicted], npt.NDArray[np.float64]]


def define_flags() -> None:
    """Defines --workdir, --output, --top, --prior, --abstain and --experts."""
    flags.DEFINE_string("workdir", "", "Folder of the run.")
    flags.DEFINE_string(
        "output",
        "predictions.csv",
        "File for the predictions, whose ending .csv or .jsonl says how they are written; - for "
        "CSV on standard output.",
    )
    flags.DEFINE_integer("top", 5, "Number of classes in a row.", lower_bound=1)
    flags.DEFINE_string(
        "prior",
        "balanced",
        "Class distribution where the images come from: balanced, train (that of the training "
        "set), a CSV file with the header class,probability, or estimate, from the images.",
    )
    flags.DEFINE_float(
        "abstain",
        None,
        "Precision to reach: a further column `decision` says unsure where the class is not "
        "certain enough, by a threshold from the held-out images.",
    )
    flags.DEFINE_bool("experts", False, "Also the most probable class of each expert.")


def main(arguments: Sequence[str]) -> None:
    """Predicts the images that the arguments name.

    Raises:
        UserError (a `ValueError`): no image, no run, or an output that cannot be written.
    """
    values = flags.FLAGS
    if not values.workdir:
        raise UserError("Expected the workdir of a trained run; give it with --workdir=RUN.")
    if values.output != "-" and not values.output.endswith((".csv", ".jsonl")):
        raise UserError(f"--output must end in .csv or .jsonl, or be -; got {values.output!r}.")
    paths = find_images(arguments[1:])
    predictor = load(values.workdir)
    if not predictor.is_calibrated:
        log.warning("No temperature was fitted on held-out images: confidences are as they are.")
    adjust = _adjustment(predictor, values.prior, paths)
    threshold = _threshold(predictor, adjust, values.abstain)
    # Rows in the terminal are progress enough.
    bar = ProgressBar(log, "Predicted", len(paths), silent=values.output == "-")
    with _opened(values.output) as file, bar:
        bad = _write(file, paths, predictor, adjust, threshold, values, bar.add)
    if values.output != "-":
        log.info(
            "%s predicted, %s that cannot be read: %s",
            f"{len(paths) - bad:,}",
            f"{bad:,}",
            values.output,
        )


def find_images(arguments: Sequence[str], listed: TextIO | None = None) -> list[str]:
    """The paths that arguments name, in their order; those of a folder are sorted.

    Args:
        arguments: Files, folders, patterns, or `-` for a list on standard input.
        listed: Lines of that list; None for standard input.

    Raises:
        UserError (a `ValueError`): no image, or an argument that names nothing.
    """
    paths: list[str] = []
    for argument in arguments:
        if argument == "-":
            lines = (line.rstrip("\r\n") for line in listed or sys.stdin)
            found = [line for line in lines if line]
        elif os.path.isdir(argument):
            found = sorted(_images_below(argument))
        elif os.path.exists(argument):
            found = [argument]
        else:
            found = sorted(glob.glob(argument, recursive=True))
        if not found and argument != "-":
            raise UserError(
                f"{argument} names no image: there is no such file, and no folder or pattern with "
                f"files that end in {', '.join(SUFFIXES)}."
            )
        paths += found
    if not paths:
        raise UserError(
            "Expected images: name files, folders or patterns, or - for a list on standard input."
        )
    return paths


def _images_below(folder: str) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(place, name)


def _adjustment(predictor: Predictor, prior: str, paths: Sequence[str]) -> Adjust:
    """The function that makes the probabilities of a batch under a prior."""
    if prior == "balanced":
        return lambda found: found.probabilities
    shares: npt.NDArray[Any]
    if prior == "train":
        shares = predictor.class_counts
    elif prior == "estimate":
        shares = _estimate(predictor, paths)
    else:
        shares = _read_prior(prior, predictor.classes)
    return lambda found: predictor.under_prior(found, shares)


def _estimate(predictor: Predictor, paths: Sequence[str]) -> npt.NDArray[np.float64]:
    """The class distribution of the images, from some of them if there are many."""
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _ESTIMATED_FROM)).round())
    found = predictor.predict([paths[int(i)] for i in chosen])
    good = found.probabilities[~np.isnan(found.probabilities).any(axis=1)]
    if not len(good):
        raise UserError("--prior=estimate needs images that can be read, and none can.")
    weight = concentration(len(good), len(predictor.classes))
    shares = np.asarray(estimate_prior(good, concentration=weight).prior, np.float64)
    order = np.argsort(-shares, kind="stable")[:3]
    most = ", ".join(f"{predictor.classes[i]} {100 * shares[i]:.1f}%" for i in order)
    log.info("Class distribution estimated from %s images; the largest: %s", len(good), most)
    return shares


def _threshold(predictor: Predictor, adjust: Adjust, precision: float | None) -> float | None:
    """The least confidence at which a class is named; None for naming all."""
    if precision is None:
        return None
    held_out = predictor.held_out()
    if held_out is None:
        raise UserError(
            "--abstain needs the predictions of held-out images, and the run has none; train with "
            "config.data.held_out_share, or leave --abstain out."
        )
    found, labels = held_out
    probabilities = adjust(found)
    right = probabilities.argmax(axis=1) == labels
    threshold = find_threshold(probabilities.max(axis=1), right, precision)
    if threshold is None:
        log.warning(
            "No confidence reaches a precision of %.1f%% on %d held-out images: all are named",
            100 * precision,
            len(labels),
        )
        return 0.0
    log.info("%s", threshold)
    return threshold.confidence


def _read_prior(path: str, classes: Sequence[str]) -> npt.NDArray[np.float64]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        given = {row["class"].strip(): float(row["probability"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(
            f"--prior={path} should be balanced, train, or a CSV file with the header "
            f"class,probability, and cannot be read so ({error})."
        ) from error
    unknown, missing = sorted(set(given) - set(classes)), sorted(set(classes) - set(given))
    if unknown or missing:
        raise UserError(
            f"{path} should have a row for each of the run's {len(classes)} classes; "
            f"{len(missing)} are missing and {len(unknown)} are unknown "
            f"(the first: {(missing + unknown)[0]})."
        )
    shares = np.array([given[name] for name in classes])
    if not (np.isfinite(shares).all() and shares.min() >= 0 and abs(shares.sum() - 1) <= 1e-3):
        raise UserError(
            f"The probabilities in {path} must not be negative and have a sum of 1, got a sum of "
            f"{shares.sum():g}."
        )
    return shares


@contextlib.contextmanager
def _opened(output: str) -> Iterator[TextIO]:
    if output == "-":
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=_NAMES)
        yield sys.stdout
        return
    path = Path(output)
    with reports_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="", errors=_NAMES) as file:
            yield file


def _write(
    file: TextIO,
    paths: Sequence[str],
    predictor: Predictor,
    adjust: Adjust,
    threshold: float | None,
    values: Any,
    count: Callable[[int], None],
) -> int:
    """Writes a row for each image; returns how many cannot be read."""
    top = min(values.top, len(predictor.classes))
    write = _jsonl_writer(file) if values.output.endswith(".jsonl") else _csv_writer(file)
    done = bad = 0
    for found in predictor.stream(paths):
        probabilities = adjust(found)
        for i in range(len(probabilities)):
            reason = found.reasons.get(i)
            row: dict[str, Any] = {"path": paths[done + i]}
            row |= _best(probabilities[i], predictor.classes, top, reason is None)
            if threshold is not None:
                row["decision"] = _decision(row, threshold) if reason is None else None
            if values.experts:
                row |= _of_experts(found, i, predictor.classes, reason is None)
            write({**row, "status": reason or OK})
            bad += reason is not None
        done += len(probabilities)
        count(len(probabilities))
    return bad


def _decision(row: dict[str, Any], threshold: float) -> str:
    return row["class_1"] if row["probability_1"] >= round(threshold, 6) else UNSURE


def _best(
    probabilities: npt.NDArray[np.float64], classes: Sequence[str], top: int, is_good: bool
) -> dict[str, Any]:
    order = np.argsort(-probabilities, kind="stable")[:top]
    row: dict[str, Any] = {}
    for rank, label in enumerate(order, 1):
        row[f"class_{rank}"] = classes[label] if is_good else None
        row[f"probability_{rank}"] = round(float(probabilities[label]), 6) if is_good else None
    return row


def _of_experts(found: Predicted, i: int, classes: Sequence[str], is_good: bool) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for number, logits in enumerate(found.expert_logits[:, i], 1):
        probabilities = softmax(logits.astype(np.float64))
        best = int(probabilities.argmax())
        row[f"expert_{number}"] = classes[best] if is_good else None
        row[f"expert_{number}_probability"] = (
            round(float(probabilities[best]), 6) if is_good else None
        )
    return row


def _csv_writer(file: TextIO) -> Callable[[dict[str, Any]], None]:
    writer: list[csv.DictWriter] = []

    def write(row: dict[str, Any]) -> None:
        if not writer:
            writer.append(csv.DictWriter(file, list(row), lineterminator="\n"))
            writer[0].writeheader()
        writer[0].writerow(row)

    return write


def _jsonl_writer(file: TextIO) -> Callable[[dict[str, Any]], None]:
    return lambda row: print(json.dumps(row, ensure_ascii=False), file=file)


if __name__ == "__main__":
    cli.run(define_flags, main)
