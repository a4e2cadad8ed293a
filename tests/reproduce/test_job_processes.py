# SPDX-License-Identifier: Apache-2.0
"""Several commands at once: in order, each with its own output, and ended together."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from balpoe_jax.reproduce import job_processes
from balpoe_jax.reproduce.job_processes import Command, environment, run_together
from tests.helpers import ROOT

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_processes, "_POLL_SECONDS", 0.01)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged, as it comes."""
    handler, logger = _Lines(), logging.getLogger("balpoe_jax.reproduce.job_processes")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


# Two jobs wait for each other, which only jobs that run at once can.
MEETING = """
import sys, time
from pathlib import Path
print(time.monotonic(), flush=True)
here = Path({here!r})
(here / sys.argv[1]).touch()
deadline = time.monotonic() + 20
while len(list(here.iterdir())) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.01)
time.sleep(0.1)
print(time.monotonic(), file=sys.stderr)
"""


def test_so_many_run_at_once_and_each_has_its_own_output(tmp_path: Path, lines: list) -> None:
    here = tmp_path / "met"
    here.mkdir()
    script = MEETING.format(here=str(here))
    commands = [Command(f"{i}", ("-c", script, f"{i}"), tmp_path / f"{i}") for i in range(4)]
    assert run_together(commands, 2, lambda done: f"well, {done.name}") == []
    spans = [[float(line) for line in each.output.read_text().splitlines()] for each in commands]
    at_once = [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans]
    assert max(at_once) == 2
    assert [line for line in lines if "begins" in line] == [
        f"[{i + 1}/4] begins: {i}" for i in range(4)
    ]
    for i in range(4):
        (end,) = (line for line in lines if line.startswith(f"[{i + 1}/4] done: {i}, "))
        assert end.endswith(f" s, well, {i}")
    assert len(lines) == 8


def test_a_failure_stops_its_students_alone(tmp_path: Path, lines: list) -> None:
    write = "from pathlib import Path; Path({!r}).touch(); raise SystemExit({})"
    made = {name: tmp_path / f"made_{name}" for name in ("bad", "student", "good", "its", "last")}

    def job(name: str, code: int = 0, after: str | None = None) -> Command:
        script = write.format(str(made[name]), code)
        return Command(name, ("-c", script), tmp_path / name, after and tmp_path / after)

    commands = [
        job("bad", 3), job("student", after="bad"), job("good"), job("its", after="good"),
        job("last", after="done before"),
    ]  # fmt: skip
    failed = run_together(commands, 2, lambda done: "fine")
    assert [each.name for each in failed] == ["bad", "student"]
    assert {name for name, path in made.items() if path.exists()} == {"bad", "good", "its", "last"}
    (end,) = (line for line in lines if "failed (exit code 3)" in line)
    assert end.startswith("[1/5]") and end.endswith(f"; see {tmp_path}/bad/terminal.log")
    assert "was not begun, since" in (tmp_path / "student" / "terminal.log").read_text()


def test_a_teacher_has_ended_before_its_student_begins(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    teach = f"import time; time.sleep(0.3); open({str(saved)!r}, 'w').close()"
    learn = f"open({str(saved)!r})"
    commands = [
        Command("teacher", ("-c", teach), tmp_path / "teacher"),
        Command("student", ("-c", learn), tmp_path / "student", tmp_path / "teacher"),
        Command("other", ("-c", ""), tmp_path / "other"),
    ]
    assert run_together(commands, 3, lambda done: "") == []


def test_output_of_an_earlier_start_is_kept(tmp_path: Path) -> None:
    commands = [Command("one", ("-c", "print('again')"), tmp_path)]
    for _ in range(2):
        run_together(commands, 2, lambda done: "")
    assert (tmp_path / "terminal.log").read_text() == "again\nagain\n"


def test_jobs_share_the_memory_of_a_device_unless_the_user_says_how() -> None:
    assert environment(3, {"A": "b"}) == {"A": "b", "XLA_CLIENT_MEM_FRACTION": "0.3"}
    assert environment(7, {}) == {"XLA_CLIENT_MEM_FRACTION": "0.128"}
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        assert environment(3, {name: "0.2"}) == {name: "0.2"}


# A run that saves when it is told to end, and takes note of every signal.
RUN = """
import signal, sys, time
from pathlib import Path
here = Path(sys.argv[1])
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
(here / "begun").touch()
deadline = time.monotonic() + 20
while not got:
    assert time.monotonic() < deadline
    time.sleep(0.01)
time.sleep(0.5)
(here / "saved").write_text(",".join(signal.Signals(number).name for number in got))
sys.exit(128 + got[0])
"""

PARENT = """
import sys
from pathlib import Path
from balpoe_jax import cli
from balpoe_jax.reproduce import job_processes

root = Path(sys.argv.pop())

def main(arguments):
    jobs = [
        job_processes.Command(name, ("-c", {run!r}, str(root / name)), root / name)
        for name in ("one", "two", "three")
    ]
    job_processes.run_together(jobs, 2, lambda done: "")

cli.run(lambda: None, main)
"""


@pytest.mark.parametrize(
    ("number", "passed_on", "code"),
    [
        (signal.SIGTERM, "SIGTERM", 143),
        (signal.SIGINT, "SIGINT", 130),
        (signal.SIGHUP, "SIGTERM", 143),
    ],
    ids=["TERM", "INT", "HUP"],
)
def test_a_signal_lets_all_jobs_save_once(
    tmp_path: Path, number: int, passed_on: str, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(run=RUN), str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    deadline = time.monotonic() + 20
    while not all((tmp_path / name / "begun").exists() for name in ("one", "two")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == code, stderr
    assert [(tmp_path / name / "saved").read_text() for name in ("one", "two")] == [passed_on] * 2
    assert not (tmp_path / "three").exists()
    assert sum("stopped: " in line for line in stdout.splitlines()) == 2
    assert stderr.splitlines() == [
        f"{'Interrupted' if code == 130 else 'Preempted'}: the runs have ended; start again to go "
        "on from there."
    ]
