# SPDX-License-Identifier: Apache-2.0
"""Sides of a benchmark in processes of their own, and one file that all of them write results to.

A side has its own flags of XLA, may need a package that is not there, may die or hang. So the
command that asks for it only waits for its process, and each result is a line of JSON in a file
once it is known. No side begins what cannot end in its time.
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

# What a process that was told to end may still take for it, in seconds.
_GRACE = 5.0


class Clock:
    """The time that is left, and whether it suffices, going by how long estimates took so far.

    Args:
        deadline: Time at which everything has to have ended, in seconds since the epoch.
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
        """The time that an estimate in seconds is likely to take."""
        return estimate * (self._taken / self._estimated if self._estimated else 1.0)

    def fits(self, estimate: float) -> bool:
        """Whether something of this estimate, in seconds, ends before the deadline."""
        return self.expected(estimate) <= self.left

    @contextlib.contextmanager
    def learn(self, estimate: float) -> Iterator[None]:
        """Takes how long the inside takes as a measure of other estimates."""
        start = self._now()
        yield
        self._estimated += estimate
        self._taken += self._now() - start


@dataclasses.dataclass(frozen=True)
class Job:
    """What a side's process is asked for.

    Attributes:
        part: Name of the part that its results belong to.
        side: Name of the side.
        results: Path of the file of results.
        deadline: Time at which it has to have ended, in seconds since the epoch.
        options: Everything else, as the module of the side wants it; plain values.
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
            UserError: anything else than one job.
        """
        try:
            (text,) = arguments[1:]
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise UserError(
                "Expected one job in JSON, which only benchmarks.accelerator writes; run that."
            ) from error


class Results:
    """The results of a side: a line each, written when it is known.

    Args:
        job: What the side is asked for.
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
            label: What tells the result from others.
            estimate: Time that it is expected to take, in seconds.
            measure: Function that returns the result.
        """
        if not self.clock.fits(estimate):
            self.write(**label, skipped=no_time(self.clock, estimate))
            return
        try:
            with self.clock.learn(estimate):
                found = measure()
        except Exception as error:  # the next one may work
            text = " ".join(str(error).split())
            self.write(**label, error=f"{type(error).__name__}: {text[:600]}")
        else:
            self.write(**label, **found)


def no_time(clock: Clock, estimate: float) -> str:
    """Why something of an estimate, in seconds, is left out."""
    return f"it would take {clock.expected(estimate):.0f} s, and {max(0, clock.left):.0f} are left"


def write(path: Path, row: Row) -> None:
    """Appends a line to a file of results, and prints it.

    Args:
        path: The file.
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
    """The results so far; half a line, of a process that was killed in it, is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def run(module: str, job: Job, log: Path, flags: Sequence[str] = (), **environment: str) -> None:
    """Runs a side in a process of its own, which is ended at its deadline.

    How it failed, if it did, becomes a result of its part.

    Args:
        module: Name of the module that is run with the job.
        job: What it is asked for.
        log: File that gets everything it prints; the terminal gets it, too.
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
    """Ends a process, and what it started, if it has not ended."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, way)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Turns SIGTERM inside into `Preempted`, wherever the program is."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is measured is still to be written
        raise Preempted("what was measured is written")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_known(flag: str) -> bool:
    """Whether the installed XLA has an option; one that it has not ends a process at once.

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
