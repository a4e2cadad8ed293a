# SPDX-License-Identifier: Apache-2.0
"""Commands of this package in processes of their own, several at once on one device."""

import collections
import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from balpoe_jax.errors import Preempted
from balpoe_jax.files import reports_write_errors

OUTPUT = "terminal.log"

log = logging.getLogger(__name__)

# The share of a GPU's memory that all jobs take together; contexts and libraries need the rest.
_SHARE_OF_MEMORY = 0.9
_MEMORY_FRACTION = "XLA_CLIENT_MEM_FRACTION"
# JAX refuses the two together, so that either counts as the user's choice.
_OLD_MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"

_POLL_SECONDS = 0.1

# The signal that the jobs get for each one to this process. A terminal that closes preempts them.
_PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


@dataclasses.dataclass(frozen=True)
class Command:
    """The command of one job.

    Attributes:
        name: Name in the lines about it.
        arguments: Arguments of `python`.
        workdir: Folder of the job, whose `OUTPUT` gets all that it prints.
        after: Workdir of the job that must be done before; None for none. A workdir that no job has
            counts as done.
    """

    name: str
    arguments: tuple[str, ...]
    workdir: Path
    after: Path | None = None

    @property
    def output(self) -> Path:
        """The file that gets what the job prints."""
        return self.workdir / OUTPUT


def run_together(
    commands: Sequence[Command], at_once: int, outcome: Callable[[Command], str]
) -> list[Command]:
    """Runs commands, several at once, and logs a line when one begins and when it ends.

    SIGINT and SIGTERM are passed on: the jobs save and end, and no other one begins.

    Args:
        commands: Commands in the order in which they begin.
        at_once: Number of jobs that run at once.
        outcome: Function that returns the end of the last line about a job that is done.

    Returns:
        The commands that failed, or whose `after` did, in the order of `commands`.

    Raises:
        Preempted: a signal came, and all jobs have ended.
        UserError (a `ValueError`): an output file that cannot be written.
    """
    with _noticed_signals() as signals:
        crew = _Crew(commands, at_once, outcome)
        try:
            while crew.busy():
                while signals:
                    crew.stop(signals.popleft())
                crew.begin()
                crew.end()
                time.sleep(_POLL_SECONDS)
        finally:
            crew.abandon()
    if crew.stopped:
        raise Preempted("the runs have ended; start again to go on from there.", crew.stopped)
    return [command for command in commands if command in crew.failed]


def environment(at_once: int, ours: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job, which assigns it its part of a GPU's memory.

    Args:
        at_once: Number of jobs that share the device.
        ours: Environment of this process; a fraction that it sets stays.
    """
    theirs = dict(ours)
    if _OLD_MEMORY_FRACTION not in theirs:
        # Rounded down, or the parts could exceed the whole.
        theirs.setdefault(_MEMORY_FRACTION, f"{int(1000 * _SHARE_OF_MEMORY / at_once) / 1000:g}")
    return theirs


class _Crew:
    """The jobs that wait, that run, and that failed."""

    def __init__(
        self, commands: Sequence[Command], at_once: int, outcome: Callable[[Command], str]
    ) -> None:
        self.failed: list[Command] = []
        self.stopped: signal.Signals | None = None
        self._numbers = {command: f"[{i}/{len(commands)}]" for i, command in enumerate(commands, 1)}
        self._waiting = list(commands)
        self._running: dict[Command, _Running] = {}
        self._at_once, self._outcome = at_once, outcome
        self._environment = environment(at_once, os.environ)

    def busy(self) -> bool:
        """Whether a job runs or is still to begin."""
        return bool(self._running or (self._waiting and not self.stopped))

    def stop(self, number: signal.Signals) -> None:
        """Passes a signal on; from now on no job begins."""
        if self._running:
            log.info("%s: %d runs are told; waiting for them", number.name, len(self._running))
        self.stopped = self.stopped or number
        for running in self._running.values():
            running.process.send_signal(number)

    def begin(self) -> None:
        """Begins the jobs that need not wait, as many as there is room for."""
        self._drop_orphans()
        unfinished = {command.workdir for command in (*self._waiting, *self._running)}
        for command in list(self._waiting):
            if self.stopped or len(self._running) == self._at_once:
                return
            if command.after not in unfinished:
                self._waiting.remove(command)
                log.info("%s begins: %s", self._numbers[command], command.name)
                self._running[command] = _start(command, self._environment)

    def _drop_orphans(self) -> None:
        """Counts jobs as failed that wait for a job that failed."""
        failed = {command.workdir for command in self.failed}
        for command in [command for command in self._waiting if command.after in failed]:
            self._waiting.remove(command)
            reason = f"not begun, since the run in {command.after} failed"
            with reports_write_errors(command.output):
                command.workdir.mkdir(parents=True, exist_ok=True)
                with command.output.open("a", encoding="utf-8") as file:
                    file.write(f"This run was {reason}.\n")
            log.info("%s %s: %s", self._numbers[command], reason, command.name)
            self.failed.append(command)

    def end(self) -> None:
        """Logs the jobs that have ended."""
        for command, running in list(self._running.items()):
            code = running.process.poll()
            if code is None:
                continue
            del self._running[command]
            if not code:
                how, more = "done", f", {self._outcome(command)}"
            elif self.stopped:
                how, more = "stopped", ""
            else:
                how, more = f"failed (exit code {code})", f"; see {command.output}"
                self.failed.append(command)
            seconds = time.monotonic() - running.began
            number = self._numbers[command]
            log.info("%s %s: %s, %.0f s%s", number, how, command.name, seconds, more)

    def abandon(self) -> None:
        """Tells jobs that still run to save and end, since this process cannot continue."""
        for running in self._running.values():
            running.process.terminate()


@dataclasses.dataclass(frozen=True)
class _Running:
    """A job and when it began, in seconds of the monotonic clock."""

    process: subprocess.Popen[bytes]
    began: float


def _start(command: Command, env: dict[str, str]) -> _Running:
    with reports_write_errors(command.output):
        command.workdir.mkdir(parents=True, exist_ok=True)
        output = command.output.open("ab")
    with output:
        process = subprocess.Popen(
            [sys.executable, *command.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            # The terminal sends Ctrl-C to its whole group, and a second signal ends a run at once.
            process_group=0,
        )
    return _Running(process, time.monotonic())


@contextlib.contextmanager
def _noticed_signals() -> Iterator[collections.deque[signal.Signals]]:
    """Collects signals, as they are to be passed on, in place of their usual effect."""
    noticed: collections.deque[signal.Signals] = collections.deque()
    before = {}
    for number, passed_on in _PASSED_ON.items():
        # The shell makes what it starts in the background ignore SIGINT, and so it stays.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(
                number, lambda *_, passed_on=passed_on: noticed.append(passed_on)
            )
    try:
        yield noticed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
