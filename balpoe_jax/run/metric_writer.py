# SPDX-License-Identifier: Apache-2.0
"""The files that a run writes as it goes: rows of metrics, curves, lines of the log.

`metrics.jsonl` grows by a line at a time, `train.log` repeats the terminal, and `tensorboard/`
holds the curves of `metrics.jsonl` as events.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from balpoe_jax.files import (
    DISCARDED,
    LOG,
    METRICS,
    reports_write_errors,
    to_json,
    write_atomically,
)
from balpoe_jax.run import multihost
from balpoe_jax.run.events import EventFile


class MetricWriter:
    """Appends rows to `metrics.jsonl` and to TensorBoard events; used as a context.

    Of several processes only the first writes.

    Args:
        workdir: Folder of the run.
        from_step: Step after which this start continues. Rows of later steps move to
            `metrics.discarded.jsonl`, since the steps will be made again.
    """

    def __init__(self, workdir: Path, from_step: int) -> None:
        self._writes = multihost.is_first()
        if not self._writes:
            return
        _discard_rows_after(workdir, from_step)
        self._path = workdir / METRICS
        with reports_write_errors(self._path):
            self._file = self._path.open("a", encoding="utf-8")
        self._events = EventFile(workdir / "tensorboard")

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writes:
            with contextlib.suppress(OSError):  # of a row that could not be written
                self._file.close()
            self._events.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; it must have an integer `step`.

        Raises:
            UserError (a `ValueError`): it cannot be written.
        """
        if not self._writes:
            return
        with reports_write_errors(self._path):
            self._file.write(json.dumps(to_json(row)) + "\n")
            self._file.flush()
        scalars = {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        }
        self._events.add(row["step"], scalars)


@contextlib.contextmanager
def log_to_file(workdir: Path) -> Iterator[None]:
    """Repeats the package's log lines in `train.log`, whether or not the caller shows them.

    Of several processes only the first logs; the others log warnings alone, and write no file.
    """
    package = logging.getLogger("balpoe_jax")
    level = package.level
    if not multihost.is_first():
        package.setLevel(logging.WARNING)
        try:
            yield
        finally:
            package.setLevel(level)
        return
    with reports_write_errors(workdir / LOG):
        handler = _LogFile(workdir / LOG, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    package.setLevel(min(level, logging.INFO) if level else logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """A log file that drops a line it cannot write, without a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Does nothing; the terminal has the line."""

    def close(self) -> None:
        """Closes the file, whether or not it has all lines."""
        with contextlib.suppress(OSError):
            super().close()


def has_test_row(workdir: Path, step: int) -> bool:
    """Whether `metrics.jsonl` has the test scores of a step."""
    lines = (workdir / METRICS).read_text(encoding="utf-8").splitlines()
    return any(row["step"] == step and "test_top1" in row for row in map(json.loads, lines))


def _discard_rows_after(workdir: Path, step: int) -> None:
    path = workdir / METRICS
    if not path.exists():
        return
    kept: list[str] = []
    dropped: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        (kept if _row_step(line) <= step else dropped).append(line)
    if dropped:
        with open(workdir / DISCARDED, "a", encoding="utf-8") as discarded:
            discarded.writelines(line if line.endswith("\n") else line + "\n" for line in dropped)
        write_atomically(path, "".join(kept))


def _row_step(line: str) -> float:
    """The step of a row; a line torn by an interruption counts as later than any."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
