# SPDX-License-Identifier: Apache-2.0
"""A profiler trace of chosen steps."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"

log = logging.getLogger(__name__)


class StepProfiler:
    """Traces the steps from `first` to `last` into the workdir's `profile`; used as a context.

    View it with TensorBoard's profile plugin or with `xprof`.

    Args:
        workdir: Folder of the run.
        steps: First and last step, counted from 1; empty for no trace. A run that starts between
            them traces the rest, and one that ends between them what it made.
    """

    def __init__(self, workdir: Path, steps: Sequence[int]) -> None:
        self._folder = workdir / FOLDER
        self._first, self._last = steps or (0, 0)
        self._running = False

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def annotate(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """The context in which to make `step`, which the trace shows as one unit."""
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, result: Any) -> None:
        """Ends the trace if `step` was its last, once `result` has been computed."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info("Profiler trace: %s", self._folder)
