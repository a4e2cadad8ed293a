# SPDX-License-Identifier: Apache-2.0
"""The command on logits of a foreign model: scikit-learn's, on long-tailed digits."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from balpoe_jax import calibrate
from balpoe_jax.data import datasets
from balpoe_jax.errors import UserError
from balpoe_jax.reporting.report import write_report
from tests.helpers import commands, flag_calls

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


def call(folder: Path, *arguments: str) -> None:
    """Calls the command with its flags; FOLDER in an argument stands for the folder."""
    given = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    flag_calls.call(calibrate, *given)


def test_logits_are_adjusted_calibrated_and_reported(foreign: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="balpoe_jax"):
        call(foreign, *GIVEN, "--classes=FOLDER/names.txt", "--output=FOLDER/a")
    results = json.loads((foreign / "a" / "results.json").read_text())
    given, *_, both, _ = results["posthoc"]["variants"]
    assert both["name"] == "adjusted, temperature"
    assert both["balanced"] > given["balanced"] + 0.03 and both["nll"] < given["nll"]
    assert both["top1"] == results["test"]["top1"]
    with np.load(foreign / "a" / "calibrated.npz") as stored:
        odds, labels = stored["probabilities"], stored["labels"]
    np.testing.assert_allclose(odds.sum(axis=1), 1, rtol=1e-5)
    assert np.mean(odds.argmax(axis=1) == labels) == pytest.approx(both["top1"])
    page = (foreign / "a" / "report" / "index.html").read_text()
    assert "280 rows of logits of one model" in page and "seven" in page
    assert "There is no config.json" not in page
    assert write_report(str(foreign / "a")).read_text() == page
    assert "held out are 120 rows, 30% of each class" in caplog.text
    assert "adjusted, temperature" in caplog.text and "Report: " in caplog.text


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
    with pytest.raises(UserError, match=message):
        call(foreign, *arguments)


def test_the_command_itself_ends_with_code_2() -> None:
    result = commands.run("balpoe_jax.calibrate", "--logits=none.npz", "--counts=1,2")
    assert result.returncode == 2
    assert result.stderr.startswith("Error: The logits none.npz cannot be read (No such file")


def test_several_models_are_averaged_and_given_rows_held_out(foreign: Path, caplog) -> None:
    with np.load(foreign / "l.npz") as stored:
        logits, labels = stored["logits"], stored["labels"]
    both = np.stack([logits, logits + np.random.default_rng(0).normal(size=logits.shape)])
    parts = {"logits": both[:, ::2], "labels": labels[::2]}
    np.savez(
        foreign / "two.npz", **parts, held_out_logits=both[:, 1::2], held_out_labels=labels[1::2]
    )
    given = "--logits=FOLDER/two.npz", "--counts=FOLDER/counts.txt", "--taus=0,1"
    with caplog.at_level(logging.INFO, logger="balpoe_jax"):
        call(foreign, *given, "--output=FOLDER/b")
    results = json.loads((foreign / "b" / "results.json").read_text())
    tau = results["posthoc"]["tau"]
    assert [expert["tau"] for expert in results["experts"]] == [tau, 1 + tau]
    assert results["temperature"]["fitted_on"] == "200 rows of the file"
    assert "drawn at random" not in caplog.text
