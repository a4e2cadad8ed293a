# SPDX-License-Identifier: Apache-2.0
"""How far a count has come: a bar in a terminal, and a line now and then in a log."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

# Seconds between lines.
_PAUSE = 5.0


class ProgressBar:
    """Counts images; a context that ends the bar.

    Args:
        log: Logger of the lines.
        done: Word for what happens to an image, such as "Checked".
        total: Number of all images.
        silent: Whether nothing is shown.
    """

    def __init__(self, log: logging.Logger, done: str, total: int, silent: bool = False) -> None:
        self._log, self._word, self._total, self._silent = log, done, total, silent
        self._count = self._told = 0
        self._begun = self._said = time.monotonic()
        self._bar = (
            tqdm(desc=done, total=total, unit=" images")
            if sys.stderr.isatty() and not silent
            else None
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif 0 < self._told < self._count == self._total:
            self._say()

    def add(self, images: int) -> None:
        """Counts some more.

        Args:
            images: Number of images.
        """
        self._count += images
        if self._bar is not None:
            self._bar.update(images)
        elif time.monotonic() - self._said > _PAUSE:
            self._say()

    def _say(self) -> None:
        if self._silent:
            return
        self._said, self._told = time.monotonic(), self._count
        rate = self._count / max(self._said - self._begun, 1e-9)
        done, total = f"{self._count:,}", f"{self._total:,}"
        self._log.info("%s %s of %s images, %.0f a second", self._word, done, total, rate)
