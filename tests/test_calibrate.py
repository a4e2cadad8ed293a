# SPDX-License-Identifier: Apache-2.0
"""The command on logits of a foreign model: scikit-learn's, on long-tailed digits."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from balpoe_jax.data import datasets
from balpoe_jax.reporting.report import write_report
from tests.helpers import commands

pytestmark = pytest.mark.integration

GIVEN = ("--logits=FOLDER/l.npz", "--counts=FOLDER/counts.txt")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the logits, counts and names, as its users would write them."""
    folder = tmp_path_factory.mktemp("foreign")
    digits = datasets.load("digits", 26.0)
    features, tested = (
        source.images.reshape(len(source), -1) / 255 for source in (digits.train, digits.test)
    )
    model = LogisticRegression(max_iter=1000).fit(features, digits.train.labels)
    np.savez(folder / "l.npz", logits=model.predict_log_proba(tested), labels=digits.test.labels)
    np.savetxt(folder / "counts.txt", digits.class_counts, fmt="%d")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (folder / "names.txt").write_text("\n".join(names))
    return folder


def call(folder: Path, *arguments: str):
    """Runs the command; FOLDER in an argument stands for the folder."""
    given = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    return commands.run("balpoe_jax.calibrate", *given)


def test_logits_are_adjusted_calibrated_and_reported(foreign: Path) -> None:
    result = call(foreign, *GIVEN, "--classes=FOLDER/names.txt", "--output=FOLDER/a")
    assert result.returncode == 0, result.stderr
    results = json.loads((foreign / "a" / "results.json").read_text())
    given, *_, both, _ = results["posthoc"]["variants"]
    assert both["name"] == "adjusted, temperature"
    assert both["balanced"] > given["balanced"] + 0.03 and both["nll"] < given["nll"]
    assert both["top1"] == results["test"]["top1"]
    stored = np.load(foreign / "a" / "calibrated.npz")
    odds, labels = stored["probabilities"], stored["labels"]
    np.testing.assert_allclose(odds.sum(axis=1), 1, rtol=1e-5)
    assert np.mean(odds.argmax(axis=1) == labels) == pytest.approx(both["top1"])
    page = (foreign / "a" / "report" / "index.html").read_text()
    assert "280 rows of logits of one model" in page and "seven" in page
    assert "There is no config.json" not in page
    assert write_report(str(foreign / "a")).read_text() == page
    assert "held out are 120 rows, 30% of each class" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Expected logits and class counts"),
        (("--logits=FOLDER/none.npz", "--counts=1,2"), "none.npz cannot be read"),
        (("--logits=FOLDER/l.npz", "--counts=1,2"), "for each of the 10 classes, got 2"),
        (
            (*GIVEN, "--taus=0,1"),
            "each of the 1 models",
        ),
        (
            (*GIVEN, "--taus=a"),
            "--taus should be numbers",
        ),
        (
            (*GIVEN, "--output=/proc/x"),
            "cannot be written",
        ),
        (
            (*GIVEN, "more"),
            "Unexpected argument 'more'",
        ),
    ],
)
def test_mistakes_are_one_sentence(foreign: Path, arguments: tuple, message: str) -> None:
    result = call(foreign, *arguments)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert result.stderr.strip().count("\n") == 0
