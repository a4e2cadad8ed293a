# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, by which schedulers announce that they take the machine away: save, then stop."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class PreemptionNotice:
    """Whether SIGTERM has come; used as a context around the steps of a training.

    One process takes the signal itself; a second one ends it at once. Of several processes, JAX
    takes it from when they joined on, and lets all of them stop after the same step, whichever of
    them got it.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._before: Any = None

    def __enter__(self) -> "PreemptionNotice":
        # Python leaves signals to the main thread; elsewhere they are the caller's business.
        main_thread = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and main_thread:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def stops_after(self, step: int) -> bool:
        """Whether this step is the last one; every process must ask after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noticed

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
