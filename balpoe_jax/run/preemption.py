# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, by which schedulers announce that they take the machine away, and SIGINT: save and stop.

Importing this does not import JAX, so that a command can mind signals before it does.
"""

import collections
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from balpoe_jax.errors import Preempted

_HANDLED = 128  # a bit that is added to the number of a signal

log = logging.getLogger(__name__)


class PreemptionNotice:
    """Whether the process was told to end. A command that owns its process enters it as a context.

    As long as there is nothing to save, a signal ends the process at once. Once there is, the first
    one is noticed, for the training to save and stop, and a second one ends the process at once.

    Once several processes have joined, JAX takes SIGTERM and lets all of them stop at the same
    place, whichever of them got it. SIGINT is handed on to it.

    A notice that is not entered never notices a signal to its own process.

    Args:
        report: Function that prints an error and returns the exit code that it calls for.
    """

    def __init__(self, report: Callable[[BaseException], int] | None = None) -> None:
        self._report = report
        self._before: dict[int, Any] = {}
        self._guard = threading.Lock()
        self._first: signal.Signals | None = None
        self._unsaved = self._agreed = False
        self._calls = 0
        self._at_exit: list[Callable[[], None]] = []

    def __enter__(self) -> "PreemptionNotice":
        # A thread of its own is told of signals even while a library computes for minutes in the
        # main thread, where Python's handlers would wait for it to return.
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing.fileno())
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        for one in (signal.SIGTERM, signal.SIGINT):
            # The shell makes what it starts in the background ignore SIGINT, and so it stays.
            if signal.getsignal(one) is not signal.SIG_IGN:
                self._before[one] = signal.signal(one, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}
        signal.set_wakeup_fd(self._wakeup_before)
        self._writing.close()  # which ends the thread

    def at_exit(self, function: Callable[[], None]) -> None:
        """Has a function called before a signal ends the process at once."""
        self._at_exit.append(function)

    def mark_unsaved(self) -> None:
        """From now on there is something to save."""
        with self._guard:
            self._unsaved = True

    def mark_saved(self, where: str) -> None:
        """From now on there is nothing more to save; every process must call this.

        Args:
            where: Clause that says where all is saved.

        Raises:
            Preempted: a signal came before.
        """
        if self.requested():
            raise self.preempted(where)
        with self._guard:
            self._unsaved = False
        self._take_from_jax()
        if self.requested():  # in between
            raise self.preempted(where)

    def requested(self) -> bool:
        """Whether to save and stop here; every process must ask at the same places."""
        if self._agreed:
            return True
        if not _is_shared():
            self._agreed = self._first is not None
            return self._agreed
        from jax.experimental import multihost_utils

        self._calls += 1
        self._agreed = multihost_utils.reached_preemption_sync_point(self._calls)
        if self._agreed:
            self._take_from_jax()
        return self._agreed

    def preempted(self, what_is_saved: str) -> Preempted:
        """The exception to raise once all is saved."""
        return Preempted(f"{what_is_saved}; start again to go on from there.", self._first)

    def _take_from_jax(self) -> None:
        """From now on a SIGTERM to one of several processes ends all of them at once."""
        if signal.SIGTERM in self._before:
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Tells the thread again, since an event loop of a library may have read the first."""
        with contextlib.suppress(OSError):
            self._writing.send(bytes([number | _HANDLED]))

    def _watch(self) -> None:
        seen = collections.Counter[int]()
        with self._reading as reading:
            while read := reading.recv(1):
                (said,) = read
                seen[said] += 1
                if seen[said] > seen[said ^ _HANDLED]:  # not the second report of one signal
                    self._notice(said & ~_HANDLED)

    def _notice(self, number: int) -> None:
        if number not in self._before:
            return
        with self._guard:
            at_once = self._first is not None or self._agreed or not self._unsaved
            self._first = self._first or signal.Signals(number)
        if at_once:
            self._leave()
            return  # never; but a test's stand-in for the end does
        log.warning("%s: saving what there is; a second one ends at once", self._first.name)
        if _is_shared():
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX awaits

    def _leave(self) -> None:
        """Ends this process, whatever it is doing; files on disk are complete at any moment."""
        for function in self._at_exit:
            with contextlib.suppress(Exception):
                function()
        saved = "ended at once" if self._unsaved else "there was nothing to save"
        error = Preempted(f"{saved}; start again to go on from the last checkpoint.", self._first)
        assert self._report is not None
        if _is_shared():
            from balpoe_jax.run import multihost

            multihost.stop_all(error, self._report)
        code = self._report(error)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _is_shared() -> bool:
    """Whether this is one of several processes; without importing JAX, which would take long."""
    jax = sys.modules.get("jax")
    distributed = getattr(jax, "distributed", None)  # not yet there while JAX is being imported
    return distributed is not None and bool(distributed.is_initialized())
