# SPDX-License-Identifier: Apache-2.0
"""The time between the command and the first step, part by part."""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

START_UPS = "start_up.jsonl"

log = logging.getLogger(__name__)


@dataclasses.dataclass
class StartUp:
    """A stopwatch for the parts of one start.

    Attributes:
        began: Time at which the start began, in seconds since 1970.
        seconds: Seconds of each part that was measured, in order.
    """

    began: float = dataclasses.field(default_factory=time.time)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Times what happens inside."""
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    def finish(self, workdir: Path, step: int) -> None:
        """Logs the parts and appends them to the workdir's `start_up.jsonl`, a line a start.

        Args:
            workdir: Folder of the run.
            step: Last step of the dispatch that has just been made, the first of this start.
        """
        total = time.time() - self.began
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        log.info("%.1f seconds from start to step %d: %s", total, step, parts)
        began = datetime.datetime.fromtimestamp(self.began, datetime.UTC)
        row = {
            "began": began.isoformat(timespec="seconds"),
            "step": step,
            "seconds": {part: round(value, 3) for part, value in self.seconds.items()},
            "total_seconds": round(total, 3),
        }
        with (workdir / START_UPS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def of_this_process() -> StartUp:
    """A stopwatch that has run since this process started; its imports until now are a part.

    Linux tells when the process started. On another system the stopwatch starts now.
    """
    now = time.time()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
        began = now - (since_boot - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        began = now
    began = min(began, now)  # a container may count from a later boot
    return StartUp(began, {"imports": now - began})
