# SPDX-License-Identifier: Apache-2.0
"""Whole runs of methods, with a tiny network: their batches, their phases, their evaluation."""

import json
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from balpoe_jax import evaluate, methods
from balpoe_jax.config import resolve
from balpoe_jax.experiment import build
from balpoe_jax.train import train
from tests.helpers import ROOT, tiny_network
from tests.helpers.config_files import get_config
from tests.helpers.digits_runs import final_state, interrupt, rows
from tests.helpers.method_steps import DISTINCT

pytestmark = pytest.mark.integration

# One with a second phase, one whose second phase begins with parameters of its own and projects
# them, and one that keeps a queue and a moving average; test_methods.py takes the state of every
# method through a checkpoint.
RESUMED = ("mislas", "ltwb", "paco")

# Whose batches, phases and evaluation are another one's, or are tested by themselves below.
COVERED = {
    *("balpoe", "balanced_softmax", "lade", "focal_cb", "ldam_drw", "ncl", "ride_distill"),
    *("mdcs", "gpaco", "sade", "ncl_contrast"),
}


@pytest.fixture(autouse=True)
def _tiny_experts(monkeypatch) -> None:
    monkeypatch.setattr(build, "create_model", tiny_network.create_model)


def config_of(name: str):
    """Two epochs of three steps on the digits, and as many of a second phase."""
    config = get_config("digits_lt", f"method={name},epochs=2")
    config.batch_size = 140
    config.log_every_steps = 1
    config.checkpoint.every_epochs = 1
    config.checkpoint.keep = 10
    config.eval.every_epochs = 0
    config.eval.shift_ratios = (10.0,)
    config.eval.held_out_per_class = 2
    if config.get("phase2"):
        config.phase2.epochs = 2
        config.phase2.batch_size = 140
    return config


@pytest.mark.slow_cases(
    *("bcl", "tlc", "balpoe_cs", "paco", "mislas", "crt", "lws", "los", "ltwb", "dirmixe"),
    *("proco", "concutmix", "shike", "glmc", "balpoe_plus", "balpoe_plus_cs", "ride_router"),
)
@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("name", [name for name in DISTINCT if name not in COVERED])
def test_a_run(name: str, tmp_path: Path) -> None:
    config, finished, resumed = config_of(name), tmp_path / "finished", tmp_path / "resumed"
    epochs = 4 if config.get("phase2") else 2
    results = train(resolve(config), str(finished))
    assert (results["step"], results["epoch"]) == (3 * epochs, epochs)
    assert 0 < results["test"]["top1"] <= 1 and results["shift"]["forward10"]["prior"] > 0
    logged = [row for row in rows(finished) if "loss" in row]
    assert [row["step"] for row in logged] == list(range(1, 3 * epochs + 1))
    assert all(np.isfinite(row["loss"]) for row in logged)
    recorded = json.loads((finished / "config.json").read_text())["config"]
    assert recorded["method"]["name"] == config.method.name
    if name in RESUMED:
        interrupt(finished, resumed, epoch=epochs - 1)
        assert train(resolve(config), str(resumed)) == results
        jax.tree.map(
            np.testing.assert_array_equal,
            final_state(config, resumed),
            final_state(config, finished),
        )


@pytest.mark.slow
def test_weights_of_experts_are_learnt_at_test_time(tmp_path: Path, request) -> None:
    """From views of the test images: every target has a history, and nothing else is touched."""
    config = config_of("sade")
    config.eval.expert_weights_epochs = 2
    results = train(resolve(config), str(tmp_path / "with"))
    tables = (tmp_path / "with" / "report" / "tables.md").read_text()
    request.getfixturevalue("no_page")
    config.eval.expert_weights_epochs = 0
    without = evaluate.evaluate(resolve(config), str(tmp_path / "with"))
    found = results.pop("aggregation")
    assert set(found) == set(results["shift"])
    for name, scores in found.items():
        assert len(scores["history"]) == 3 and scores["history"][0] == [1 / 3] * 3
        assert scores["weights"] == scores["history"][-1] != scores["history"][1]
        assert sum(scores["weights"]) == pytest.approx(1)
        assert scores["top1"]["equal"] == results["shift"][name]["none"]
        assert scores["top1"]["used"] == scores["top1"]["learnt"] and not scores["collapsed"]
    results.pop("settings"), without.pop("settings")
    assert results == without
    assert not list((tmp_path / "with" / "predictions").glob("view*"))
    assert "weight of 3" in tables
    # Its third expert has no tau, so that of the mean nothing can be said.
    assert "mean tau of this run" not in tables
    assert "mean tau is" not in (tmp_path / "with" / "train.log").read_text()


@pytest.mark.slow_cases("los_new-classifier re-training", "mislas-classifier tuning")
@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("name", "phase"), [("mislas", "classifier tuning"), ("los_new", "classifier re-training")]
)
def test_a_phase_that_begins_starts_the_optimizer_again(
    name: str, phase: str, tmp_path: Path
) -> None:
    """Resumed from the very end of the first phase, where the second one has yet to begin."""
    config, finished, resumed = config_of(name), tmp_path / "finished", tmp_path / "resumed"
    config.phase2.learning_rate = 0.025
    results = train(resolve(config), str(finished))
    interrupt(finished, resumed, epoch=2)
    assert train(resolve(config), str(resumed)) == results
    rates = [row["learning_rate"] for row in rows(resumed) if "loss" in row]
    assert rates[6:9] == [0.025] * 3 and rates[9] < 0.025
    count = final_state(config, finished).opt_state[1][1].count
    assert int(count) == 6 and results["step"] == 12
    assert f"the phase {phase} begins" in (resumed / "train.log").read_text()


@pytest.mark.usefixtures("no_page")
def test_the_example_of_a_method_of_ones_own(tmp_path: Path, monkeypatch) -> None:
    """Word for word, but for the file that it stands in."""
    text = (ROOT / "docs" / "methods.md").read_text()
    module = ModuleType("ramp")
    # Where the class looks its annotations up.
    monkeypatch.setitem(sys.modules, "ramp", module)
    exec(text.split("```python\n")[1].partition("```")[0], module.__dict__)
    monkeypatch.setitem(methods.PRESETS, "ramp", module.PRESETS["ramp"])
    monkeypatch.setitem(methods.METHODS, "ramp", module.Ramp)
    config = config_of("ramp")
    assert config.method.ramp_epochs == 1  # of 100 in 200
    results = train(resolve(config), str(tmp_path))
    assert results["experts"][0]["tau"] is None
    assert [row["loss_tau"] for row in rows(tmp_path) if "loss" in row] == [1.0] * 6
