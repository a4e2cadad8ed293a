# SPDX-License-Identifier: Apache-2.0
"""Signals at any moment: noticed while there is something to save, else the end at once."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from balpoe_jax import cli
from balpoe_jax.errors import Preempted
from balpoe_jax.run import preemption
from balpoe_jax.run.preemption import PreemptionNotice
from tests.helpers import ROOT

pytestmark = pytest.mark.integration

SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the process would have ended."""
    codes: list[int] = []

    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@SIGNALS
def test_with_nothing_to_save_a_signal_ends_at_once(
    left: list[int], number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    released: list[str] = []
    with PreemptionNotice(cli.report) as notice:
        notice.at_exit(lambda: 1 / 0)
        notice.at_exit(lambda: released.append("lock"))
        os.kill(os.getpid(), number)
        until(lambda: left)
    assert left == [code]
    assert released == ["lock"]
    assert "there was nothing to save; start again" in capsys.readouterr().err


@SIGNALS
def test_with_work_unsaved_the_first_is_noticed_and_the_second_ends(
    left: list[int], number: int, code: int
) -> None:
    with PreemptionNotice(cli.report) as notice:
        notice.mark_unsaved()
        assert not notice.requested()
        os.kill(os.getpid(), number)
        until(notice.requested)
        assert cli.report(notice.preempted("step 3 is saved")) == code
        assert not left
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: left)
    assert left == [code]


def test_two_signals_while_a_library_computes_end_at_once(left: list[int]) -> None:
    """Python's own handlers would have to wait for it."""

    def send() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: left)
        when.append(time.monotonic())

    when: list[float] = []
    with PreemptionNotice(cli.report) as notice:
        notice.mark_unsaved()
        sender = threading.Thread(target=send)
        sender.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # a second or more, in one call
        end = time.monotonic()
        sender.join()
    assert left == [143]
    assert when[0] < end - 0.2


def test_a_signal_before_all_is_saved_is_heeded_when_it_is(left: list[int]) -> None:
    with PreemptionNotice(cli.report) as notice:
        notice.mark_unsaved()
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: notice._first)
        with pytest.raises(Preempted, match=r"^step 9 is saved; start again to go on from there\."):
            notice.mark_saved("step 9 is saved")
    with PreemptionNotice(cli.report) as notice:
        notice.mark_unsaved()
        notice.mark_saved("step 9 is saved")
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: left)
    assert left == [143]


def test_what_an_event_loop_takes_for_itself_is_noticed_all_the_same(left: list[int]) -> None:
    with PreemptionNotice(cli.report) as notice:
        notice.mark_unsaved()
        mine = signal.set_wakeup_fd(-1)
        os.kill(os.getpid(), signal.SIGTERM)
        until(notice.requested)
        signal.set_wakeup_fd(mine)
    assert not left


def test_an_ignored_interruption_stays_ignored_and_handlers_come_back(left: list[int]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    term = signal.getsignal(signal.SIGTERM)
    try:
        with PreemptionNotice(cli.report):
            assert signal.getsignal(signal.SIGTERM) != term
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is term
    finally:
        signal.signal(signal.SIGINT, before)
    assert not left


def test_a_notice_that_is_not_entered_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    notice = PreemptionNotice()
    notice.mark_unsaved()
    notice.mark_saved("all")
    assert not notice.requested()
    assert signal.getsignal(signal.SIGTERM) is before


def test_of_several_processes_jax_decides_where_to_stop(
    monkeypatch: pytest.MonkeyPatch, left: list[int]
) -> None:
    """SIGINT is handed on to it; after the agreement a SIGTERM is the second one."""
    asked: list[int] = []
    jax_noticed: list[int] = []

    def reached(number: int) -> bool:
        asked.append(number)
        return len(jax_noticed) > 0 and number == 4

    def stop_all(error: BaseException, report: Callable[[BaseException], int]) -> None:
        os._exit(report(error))

    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", reached)
    monkeypatch.setattr("balpoe_jax.run.multihost.stop_all", stop_all)
    with PreemptionNotice(cli.report) as notice:
        monkeypatch.setattr(preemption, "_is_shared", lambda: True)
        monkeypatch.setattr(os, "kill", lambda _, number: jax_noticed.append(number))
        notice.mark_unsaved()
        assert not notice.requested()
        signal.raise_signal(signal.SIGINT)
        until(lambda: jax_noticed)
        found = [notice.requested() for _ in range(4)]
        assert found == [False, False, True, True]
        assert asked == [1, 2, 3, 4]
        assert cli.report(notice.preempted("step 3 is saved")) == 130
        assert not left
        signal.raise_signal(signal.SIGTERM)
        until(lambda: left)
    assert jax_noticed == [signal.SIGTERM]
    assert left[0] == 130


def test_the_command_minds_signals_before_anything_else(tmp_path: Path) -> None:
    code = (
        "import threading; from balpoe_jax import cli, main; "
        "main._processes = lambda: (print('ready', flush=True), "
        "threading.Event().wait()); "
        "cli.run(main.define_flags, main.main)"
    )
    root = ROOT
    with subprocess.Popen(
        [sys.executable, "-c", code, "--config=configs/digits_lt.py", f"--workdir={tmp_path}"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.terminate()
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 143
    assert errors == (
        "Preempted: there was nothing to save; start again to go on from the last checkpoint.\n"
    )
