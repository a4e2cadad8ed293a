# SPDX-License-Identifier: Apache-2.0
"""Runs of an older version are evaluated and resumed; `fixtures/README.md` tells which."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.evaluate import evaluate
from balpoe_jax.train import train
from configs import digits_lt
from tests.helpers import FIXTURES

RUNS = FIXTURES / "runs"

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_page")]


def config_of(arguments: str, **fields: object) -> digits_lt.ConfigDict:
    config = digits_lt.get_config(arguments)
    config.model.reduce_dimension = True
    config.checkpoint.update(keep=1, every_epochs=1)
    config.update(fields)
    return config


def test_a_finished_run_is_evaluated(tmp_path: Path) -> None:
    workdir = shutil.copytree(RUNS / "finished", tmp_path / "run")
    before = json.loads((workdir / "results.json").read_text())
    (workdir / "results.json").unlink()
    results = evaluate(resolve(config_of("epochs=2")), str(workdir))
    assert results["step"] == before["step"] == 26
    assert results["class_counts"] == before["class_counts"]
    assert results["num_parameters"] == before["num_parameters"]
    # An image of 400 may tip over where another processor rounds otherwise.
    assert results["test"]["top1"] == pytest.approx(before["test"]["top1"], abs=0.006)
    assert results["test"]["nll"] == pytest.approx(before["test"]["nll"], rel=1e-4)
    assert [expert["tau"] for expert in results["experts"]] == [0, 1, 2]


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    workdir = shutil.copytree(RUNS / "interrupted", tmp_path / "run")
    train(resolve(config_of("method=paco,epochs=2", log_every_steps=1)), str(workdir))
    expected = _rows(RUNS / "interrupted_goes_on.jsonl")
    rows = _rows(workdir / "metrics.jsonl")[9:]
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    losses, wanted = ([row["loss"] for row in each if "loss" in row] for each in (rows, expected))
    # Roundings of another processor or version grow from step to step.
    np.testing.assert_allclose(losses[:4], wanted[:4], rtol=1e-3)
    np.testing.assert_allclose(losses, wanted, rtol=0.05)


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
