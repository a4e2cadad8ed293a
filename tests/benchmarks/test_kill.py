# SPDX-License-Identifier: Apache-2.0
"""A few kills of the real command; `benchmarks/kill_test.py` makes as many as one likes."""

import os
import shutil
from pathlib import Path

import pytest

from benchmarks import kill_test

pytestmark = pytest.mark.integration

CACHE = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_killed_runs_end_as_an_undisturbed_one(tmp_path: Path) -> None:
    command = kill_test.Command("configs/digits_lt.py:experts=1", 2, CACHE)
    figures = kill_test.kill_and_compare(command, tmp_path, 2, 3, ["KILL", "TERM"], warm=False)
    assert figures.losses == []
    assert sum(figures.kills.values()) == 2
    assert figures.starts > figures.runs
    check_that_losses_are_found(tmp_path / "undisturbed", tmp_path / "copy")


def check_that_losses_are_found(undisturbed: Path, copy: Path) -> None:
    shutil.copytree(undisturbed, copy)
    assert kill_test.difference(copy, undisturbed) is None
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    for changed in (
        "".join(lines[1:]),
        "".join([*lines, lines[-1]]),
        "".join(lines)[:-1],
        "".join(lines).replace('"loss": ', '"loss": 1', 1),
    ):
        (copy / "metrics.jsonl").write_text(changed)
        assert "metrics.jsonl" in (kill_test.difference(copy, undisturbed) or "")
    shutil.copy(undisturbed / "metrics.jsonl", copy / "metrics.jsonl")
    (copy / "predictions" / ".half").touch()
    assert kill_test.difference(copy, undisturbed) == "only one has predictions/.half"
    (copy / "predictions" / ".half").unlink()
    (copy / "results.json").write_text("{}")
    assert kill_test.difference(copy, undisturbed) == "results.json differs"


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_another_last_checkpoint_is_a_loss(tmp_path: Path) -> None:
    from balpoe_jax.run.checkpoint import Checkpoints
    from tests.helpers.states import make_state

    for name in ("a", "b", "c"):
        with Checkpoints(str(tmp_path / name / "checkpoints")) as checkpoints:
            state = make_state(3)
            if name == "c":
                kernel = state.params["kernel"].at[5].multiply(1 + 1e-7)
                state = state.replace(params={"kernel": kernel})
            checkpoints.save(state)
    assert kill_test._difference_of_state(tmp_path / "a", tmp_path / "b") is None
    found = kill_test._difference_of_state(tmp_path / "a", tmp_path / "c")
    assert found == "['params']['kernel'] of the last checkpoint differs"
