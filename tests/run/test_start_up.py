# SPDX-License-Identifier: Apache-2.0
"""The stopwatch of a start."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from balpoe_jax.run.startup_times import START_UPS, StartUp, of_this_process
from tests.helpers import ROOT


def test_parts_and_total_are_appended_to_the_record(tmp_path: Path) -> None:
    for step in (1, 8):
        start_up = StartUp(began=time.time() - 5)
        with start_up.measure("data"):
            time.sleep(0.05)
        start_up.finish(tmp_path, step)
    first, second = map(json.loads, (tmp_path / START_UPS).read_text().splitlines())
    assert (first["step"], second["step"]) == (1, 8)
    assert 0.05 <= first["seconds"]["data"] < 2
    assert 5 <= first["total_seconds"] < 10


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells")
def test_the_time_before_python_ran_any_of_our_code_counts() -> None:
    """Of a process that sleeps before it asks."""
    code = (
        "import time; time.sleep(1); from balpoe_jax.run.startup_times import of_this_process; "
        "print(of_this_process().seconds['imports'])"
    )
    start = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert 1 <= float(output.stdout) <= time.perf_counter() - start + 0.1


def test_where_the_system_does_not_tell_the_clock_starts_now(monkeypatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert of_this_process().seconds["imports"] == 0
