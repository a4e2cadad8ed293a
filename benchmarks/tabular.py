# SPDX-License-Identifier: Apache-2.0
"""Compares `BalancedProductClassifier` with what is usual for unequal classes.

    python -m benchmarks.tabular [--features=FILE.npz] [--output=FILE]

All are fitted in one run on the same rows: long-tailed digits, drawn clusters of 10,000 rows, and
the features of a file, such as those of images by a pretrained network. The file has the arrays
`train_features` [N, D], `train_labels` [N], `test_features` and `test_labels`. imbalanced-learn's
are skipped with a sentence where it is not installed.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from absl import flags
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.preprocessing import StandardScaler

from balpoe_jax import cli, metrics
from balpoe_jax.data import datasets
from balpoe_jax.data.long_tail import exponential_counts
from balpoe_jax.errors import UserError
from balpoe_jax.evaluation import posthoc
from balpoe_jax.reporting import tables
from balpoe_jax.sklearn import BalancedProductClassifier
from benchmarks import measuring

Data = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
Fit = Callable[[npt.NDArray[Any], npt.NDArray[Any]], Callable[[npt.NDArray[Any]], npt.NDArray[Any]]]

_PLAIN = "LogisticRegression"


def digits() -> Data:
    """413 long-tailed training images of digits, and 400 balanced test images."""
    data = datasets.load("digits", 26.0)
    parts: list[Any] = [data.train, data.test]
    train, test = (part.images[..., 0].reshape(len(part), -1) / 255 for part in parts)
    return train, data.train.labels, test, data.test.labels


def clusters(rows: int = 10_000, classes: int = 20) -> Data:
    """Drawn clusters of 40 features, an imbalance ratio of 100, and 200 test rows a class."""
    counts = exponential_counts(classes, rows // 4, 100.0)
    counts = np.maximum(1, counts * rows // counts.sum())
    features, labels = make_classification(
        n_samples=classes * (int(counts.max()) + 200),
        n_features=40,
        n_informative=15,
        n_classes=classes,
        n_clusters_per_class=2,
        class_sep=1.2,
        flip_y=0.0,
        random_state=0,
    )
    train, test = [], []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        test.append(members[:200])
        train.append(members[200 : 200 + count])
    chosen, apart = np.concatenate(train), np.concatenate(test)
    return features[chosen], labels[chosen], features[apart], labels[apart]


def stored(path: str) -> Data:
    """Features of a file, standardised by those of training.

    Raises:
        UserError (a `ValueError`): a file that cannot be read, or arrays that do not fit.
    """
    names = [f"{part}_{kind}" for part in ("train", "test") for kind in ("features", "labels")]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            train, labels, test, truth = (arrays[name] for name in names)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} should have the arrays {', '.join(names)} ({error}).") from error
    fits = train.ndim == test.ndim == 2 and train.shape[1:] == test.shape[1:]
    classes = np.arange(labels.max() + 1) if labels.size else labels
    if not fits or labels.shape != train.shape[:1] or truth.shape != test.shape[:1]:
        raise UserError(f"{path} should have features [N, D] and labels [N] of the same N.")
    if not np.array_equal(np.unique(labels), classes) or not np.isin(truth, classes).all():
        raise UserError(f"The labels in {path} should be 0 to C - 1, each with a training row.")
    scaler = StandardScaler().fit(train)
    return scaler.transform(train), labels, scaler.transform(test), truth


def peers() -> tuple[dict[str, Fit], str]:
    """What is compared, by name, and a sentence on what is missing."""

    def of(make: Callable[[], Any]) -> Fit:
        return lambda features, labels: make().fit(features, labels).predict_proba

    def adjusted(features: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Any:
        model = LogisticRegression(max_iter=1000).fit(features, labels)
        counts = np.bincount(labels)
        return lambda tested: metrics.softmax(
            posthoc.adjust(model.predict_log_proba(tested), counts, 1.0)
        )

    found: dict[str, Fit] = {
        _PLAIN: of(lambda: LogisticRegression(max_iter=1000)),
        "the same, balanced weights": of(
            lambda: LogisticRegression(max_iter=1000, class_weight="balanced")
        ),
        "the same, adjusted after": adjusted,
        "BalPoE, linear": of(BalancedProductClassifier),
        "BalPoE, 64 hidden units": of(
            lambda: BalancedProductClassifier(hidden_layers=(64,), random_state=0)
        ),
        "the same, half the features": of(
            lambda: BalancedProductClassifier(hidden_layers=(64,), max_features=0.5, random_state=0)
        ),
        "the same, bootstrap": of(
            lambda: BalancedProductClassifier(hidden_layers=(64,), bootstrap=True, random_state=0)
        ),
        "one expert of 64, tau 1": of(
            lambda: BalancedProductClassifier(1, hidden_layers=(64,), random_state=0)
        ),
    }
    try:
        from imblearn.ensemble import BalancedRandomForestClassifier
        from imblearn.over_sampling import SMOTE, RandomOverSampler
        from imblearn.pipeline import make_pipeline
    except ImportError:
        return found, "imbalanced-learn is not installed (pip install imbalanced-learn)."
    for sampler in (RandomOverSampler(random_state=0), SMOTE(k_neighbors=3, random_state=0)):
        linear = LogisticRegression(max_iter=1000)
        whole = functools.partial(make_pipeline, sampler, linear)
        found[f"{type(sampler).__name__}, {_PLAIN}"] = of(whole)
    found["BalancedRandomForest"] = of(lambda: BalancedRandomForestClassifier(random_state=0))
    return found, ""


def measure(fit: Fit, data: Data) -> dict[str, float]:
    """Scores on the test rows, and seconds of a fit."""
    features, labels, tested, truth = data
    start = time.perf_counter()
    predict = fit(features, labels)
    seconds = time.perf_counter() - start
    odds = predict(tested)
    predicted = odds.argmax(axis=1)
    bins = metrics.bin_confidences(odds.max(axis=1), predicted == truth, 15)
    return {
        "balanced": float(balanced_accuracy_score(truth, predicted)),
        "f1": float(f1_score(truth, predicted, average="macro")),
        "ece": float(bins.ece),
        "seconds": seconds,
    }


def as_table(name: str, rows: dict[str, dict[str, float]]) -> tables.Table:
    """The scores on one data set; seconds are those of the plain classifier times a ratio."""
    plain = rows[_PLAIN]["seconds"]
    columns = (
        *(tables.Column(title) for title in ("balanced", "macro-F1", "ECE")),
        tables.Column("seconds", "short"),
        tables.Column("ratio", "short"),
    )
    content = [
        (label, [*(row[k] for k in ("balanced", "f1", "ece", "seconds")), row["seconds"] / plain])
        for label, row in rows.items()
    ]
    return tables.Table(name, name, columns, content)


def define_flags() -> None:
    """Defines --output, --rows and --features."""
    flags.DEFINE_string("output", "", "JSON file for the figures, which are printed as well.")
    flags.DEFINE_integer("rows", 10_000, "Training rows of the clusters.", lower_bound=400)
    flags.DEFINE_string("features", "", "File of features and labels to compare on as well.")


def main(arguments: Sequence[str]) -> None:
    """Fits and prints, following the flags."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    sets: dict[str, Callable[[], Data]] = {
        "digits": digits,
        "clusters": functools.partial(clusters, flags.FLAGS.rows),
    }
    if flags.FLAGS.features:
        sets = {"features": functools.partial(stored, flags.FLAGS.features), **sets}
    compared, missing = peers()
    machine = measuring.describe_machine(("scikit-learn", "imbalanced-learn"))
    print(measuring.machine_line(machine), missing, sep="\n")
    found: dict[str, Any] = {"machine": machine}
    for name, load in sets.items():
        data = load()
        rows = {label: measure(fit, data) for label, fit in compared.items()}
        found[name] = rows
        print(f"\n{name}: {len(data[1]):,} rows, {data[0].shape[1]} features")
        print(tables.as_text(as_table(name, rows)))
    if flags.FLAGS.output:
        Path(flags.FLAGS.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(define_flags, main)
