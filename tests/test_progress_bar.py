# SPDX-License-Identifier: Apache-2.0
"""Lines of a log, a bar in a terminal, or nothing."""

import logging
import sys

import pytest

from balpoe_jax import progress_bar
from balpoe_jax.progress_bar import ProgressBar

log = logging.getLogger("tests.progress_bar")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_bar, "time", clock)
    caplog.set_level(logging.INFO)
    return clock


def test_a_log_has_a_line_now_and_then_and_a_last_one(clock: Clock, caplog) -> None:
    with ProgressBar(log, "Checked", 3000) as bar:
        for _ in range(3):
            clock.now += 4
            bar.add(1000)
    assert caplog.messages == [
        "Checked 2,000 of 3,000 images, 250 a second",
        "Checked 3,000 of 3,000 images, 250 a second",
    ]


def test_a_last_line_is_not_said_twice(clock: Clock, caplog) -> None:
    with ProgressBar(log, "Checked", 30) as bar:
        clock.now += 6
        bar.add(30)
    assert caplog.messages == ["Checked 30 of 30 images, 5 a second"]


def test_what_is_interrupted_has_no_last_line(clock: Clock, caplog) -> None:
    def interrupted() -> None:
        with ProgressBar(log, "Checked", 3000) as bar:
            clock.now += 6
            bar.add(1000)
            clock.now += 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert caplog.messages == ["Checked 1,000 of 3,000 images, 167 a second"]


def test_what_is_done_at_once_or_silent_says_nothing(clock: Clock, caplog) -> None:
    with ProgressBar(log, "Checked", 10) as bar:
        bar.add(10)
    with ProgressBar(log, "Checked", 10, silent=True) as bar:
        clock.now += 60
        bar.add(10)
    assert caplog.messages == []


def test_a_terminal_has_a_bar_and_no_lines(clock: Clock, caplog, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar(log, "Predicted", 10) as bar:
        clock.now += 60
        bar.add(10)
    shown = capsys.readouterr().err
    assert "Predicted: 100%" in shown and "images/s" in shown
    assert caplog.messages == []
