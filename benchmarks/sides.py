# SPDX-License-Identifier: Apache-2.0
"""Runs the sides of a benchmark in their own processes, which write results to one file.

A side has its own flags of XLA, may need a package that is not installed, and may crash or hang.
So the command only waits for its process. Each result is a line of JSON in the file once it is
known. A side begins nothing that would not end in time.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from balpoe_jax.errors import Preempted, UserError

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]

# Seconds that a process may take to end after it was told to.
_GRACE = 5.0


class Clock:
    """Tells the time left, and whether it suffices, correcting estimates by those so far.

    Args:
        deadline: End of the time for everything, in seconds since the epoch.
        now: Source of the present time.
    """

    def __init__(self, deadline: float, now: Callable[[], float] = time.time) -> None:
        self.deadline = deadline
        self._now = now
        self._estimated = self._taken = 0.0

    @property
    def left(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self.deadline - self._now()

    def expected(self, estimate: float) -> float:
        """The seconds that a task with this estimate is likely to take."""
        return estimate * (self._taken / self._estimated if self._estimated else 1.0)

    def fits(self, estimate: float) -> bool:
        """Whether a task with this estimate, in seconds, ends before the deadline."""
        return self.expected(estimate) <= self.left

    @contextlib.contextmanager
    def learn(self, estimate: float) -> Iterator[None]:
        """Times the code inside, to correct later estimates."""
        start = self._now()
        yield
        self._estimated += estimate
        self._taken += self._now() - start


@dataclasses.dataclass(frozen=True)
class Job:
    """The task of a side's process.

    Attributes:
        part: Name of the part that its results belong to.
        side: Name of the side.
        results: Path of the file of results.
        deadline: End of the side's time, in seconds since the epoch.
        options: Further plain values for the module of the side.
    """

    part: str
    side: str
    results: str
    deadline: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Job":
        """The job in the command line of a side's process.

        Raises:
            UserError: arguments that are not one job.
        """
        try:
            (text,) = arguments[1:]
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise UserError(
                "Expected one job in JSON, which only benchmarks.accelerator writes; run that."
            ) from error


class Results:
    """Writes the results of a side, each as a line once it is known.

    Args:
        job: Job of the side.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.clock = Clock(job.deadline)

    def write(self, **values: Any) -> None:
        """Appends a result to the file, and prints it."""
        write(Path(self._job.results), {"part": self._job.part, "side": self._job.side, **values})

    def attempt(self, label: Row, estimate: float, measure: Callable[[], Row]) -> None:
        """Writes what `measure` returns, that it failed, or that there was no time for it.

        Args:
            label: Values that identify the result.
            estimate: Expected time in seconds.
            measure: Function that returns the result.
        """
        if not self.clock.fits(estimate):
            self.write(**label, skipped=no_time(self.clock, estimate))
            return
        try:
            with self.clock.learn(estimate):
                found = measure()
        except Exception as error:  # other measurements may work
            text = " ".join(str(error).split())
            self.write(**label, error=f"{type(error).__name__}: {text[:600]}")
        else:
            self.write(**label, **found)


def no_time(clock: Clock, estimate: float) -> str:
    """The reason to leave out a task with this estimate, in seconds."""
    return f"it would take {clock.expected(estimate):.0f} s, and {max(0, clock.left):.0f} are left"


def write(path: Path, row: Row) -> None:
    """Appends a line to a file of results, and prints it.

    Args:
        path: Path of the file.
        row: Result; numbers that are not finite become null.
    """
    row = {name: _plain(value) for name, value in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
    print(" ".join(shown), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read(path: Path) -> list[Row]:
    """The results so far, without half a line that a killed process may leave."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def run(module: str, job: Job, log: Path, flags: Sequence[str] = (), **environment: str) -> None:
    """Runs a side in its own process, which is ended at its deadline.

    A failure becomes a result of its part.

    Args:
        module: Name of the module to run.
        job: Job of the module.
        log: File for everything that the process prints, which the terminal shows as well.
        flags: Options of XLA, added to those of this process.
        **environment: Variables to set.
    """
    unknown = [flag for flag in flags if not is_known(flag)]
    if unknown:
        write(Path(job.results), _failure(job, f"this XLA does not know {', '.join(unknown)}"))
        return
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    if flags:
        variables["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
    command = [sys.executable, "-m", module, json.dumps(dataclasses.asdict(job))]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=_tee, args=(process.stdout, log, lines), daemon=True)
    reader.start()
    try:
        code = process.wait(max(1.0, job.deadline - time.time()))
        reader.join(_GRACE)
        if code:
            said = f": {lines[-1].strip()[:300]}" if lines else ""
            write(Path(job.results), _failure(job, f"it ended with exit code {code}{said}"))
    except subprocess.TimeoutExpired:
        write(Path(job.results), _failure(job, "it was ended at its time limit"))
    finally:
        _end(process)


def _failure(job: Job, error: str) -> Row:
    return {"part": job.part, "side": job.side, "error": error}


def _tee(stream: IO[str], log: Path, lines: list[str]) -> None:
    with stream, log.open("a", encoding="utf-8") as file:
        for line in stream:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
            lines[:] = [line] if line.strip() else lines


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process that still runs, and the processes that it started."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, way)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Makes SIGTERM raise `Preempted` in the code inside."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the results are still to be written
        raise Preempted("what was measured is written")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_known(flag: str) -> bool:
    """Whether the installed XLA knows an option; an unknown one ends a process at once.

    Args:
        flag: Option with its value, such as `--xla_gpu_deterministic_ops=true`.
    """
    name = flag.removeprefix("--").partition("=")[0].encode()
    spec = importlib.util.find_spec("jaxlib")
    folders = (spec.submodule_search_locations if spec else None) or []
    libraries = [path for folder in folders for path in Path(folder).glob("*.so")]
    return any(_contains(path, name) for path in libraries)


def _contains(path: Path, text: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0
