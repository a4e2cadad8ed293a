# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a workdir, on one host and between hosts."""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from balpoe_jax.errors import TransientError, UserError
from balpoe_jax.run import lock
from balpoe_jax.run.lock import LOCK, Owner, WorkdirLock

QUICK = {"silent_seconds": 0.6, "beat_seconds": 0.05}


def dead_owner(**changes: object) -> Owner:
    """A process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    ended = {"pid": process.pid, "started": "1", "token": "dead"}
    return dataclasses.replace(Owner.of_this_process(), **(ended | changes))


def elsewhere(**changes: object) -> Owner:
    return dataclasses.replace(
        Owner.of_this_process(), host="other", machine="another boot", token="far", **changes
    )


def put(workdir: Path, owner: Owner, name: str = LOCK) -> None:
    (workdir / name).write_text(json.dumps(dataclasses.asdict(owner)))


def holder(workdir: Path) -> str:
    return json.loads((workdir / LOCK).read_text())["token"]


def test_a_second_run_is_refused_at_once_and_told_whose_it_is(tmp_path: Path) -> None:
    with WorkdirLock(tmp_path):
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"in use by another run \(process {os.getpid()} on "):
            WorkdirLock(tmp_path).acquire()
        assert time.monotonic() - start < 1
    assert not list(tmp_path.iterdir())
    with WorkdirLock(tmp_path):
        assert os.listdir(tmp_path) == [LOCK]


@pytest.mark.parametrize("reused", [False, True])
def test_a_dead_run_of_this_host_costs_no_waiting(
    tmp_path: Path, reused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when another process has its number now."""
    put(tmp_path, dead_owner(**({"pid": os.getpid()} if reused else {})))
    start = time.monotonic()
    with caplog.at_level(logging.INFO, "balpoe_jax"), WorkdirLock(tmp_path):
        assert time.monotonic() - start < 1
        assert holder(tmp_path) != "dead"
    assert "Took over the workdir from a run that is gone (process " in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 20
    while lock._started(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.returncode is None
    assert not lock._started(process.pid)
    process.wait()


def test_a_run_on_another_host_is_seen_to_live(tmp_path: Path) -> None:
    """By its signs of life alone; its clock is years behind."""
    put(tmp_path, elsewhere())

    def live() -> None:
        for beat in range(200):
            if done.wait(0.05):
                break
            os.utime(tmp_path / LOCK, (beat, beat))

    done = threading.Event()
    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by another run \(process \d+ on other, since"):
            WorkdirLock(tmp_path, **QUICK).acquire()
    finally:
        done.set()
        thread.join()
    assert holder(tmp_path) == "far"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}', None])
def test_a_silent_lock_of_elsewhere_or_nobody_is_taken_after_a_while(
    tmp_path: Path, content: str | None
) -> None:
    put(tmp_path, elsewhere())
    if content is not None:
        (tmp_path / LOCK).write_text(content)
    future = time.time() + 1e6
    os.utime(tmp_path / LOCK, (future, future))
    start = time.monotonic()
    with WorkdirLock(tmp_path, **QUICK):
        assert 0.5 < time.monotonic() - start < 5
        assert holder(tmp_path) != "far"
    assert not list(tmp_path.iterdir())


def test_the_holder_gives_signs_of_life(tmp_path: Path) -> None:
    with WorkdirLock(tmp_path, **QUICK):
        os.utime(tmp_path / LOCK, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.integration
def test_of_many_that_take_over_one_wins(tmp_path: Path) -> None:
    for attempt in range(20):
        put(tmp_path, dead_owner(token=f"dead{attempt}"))
        if attempt % 2:  # one that was killed as it took over
            put(tmp_path, dead_owner(token="heir"), f".{LOCK}.after-dead{attempt}")
        contenders = [WorkdirLock(tmp_path, **QUICK) for _ in range(8)]
        outcomes: list[object] = []
        gate = threading.Barrier(len(contenders))

        def contend(contender: WorkdirLock, outcomes=outcomes, gate=gate) -> None:
            gate.wait()
            try:
                contender.acquire()
                outcomes.append(contender)
            except UserError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=contend, args=(one,)) for one in contenders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == len(contenders)
        (winner,) = [one for one in outcomes if isinstance(one, WorkdirLock)]
        winner.check()
        winner.release()
        assert not list(tmp_path.iterdir())


def test_a_run_notices_that_its_workdir_is_not_its_own_any_more(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    with WorkdirLock(workdir) as held:
        held.check()
        put(workdir, elsewhere())
        with pytest.raises(UserError, match=r"taken over by another run \(process \d+ on other"):
            held.check()
    assert holder(workdir) == "far"  # and is left as it is
    (workdir / LOCK).unlink()
    with WorkdirLock(workdir) as held:
        shutil.rmtree(workdir)
        with pytest.raises(TransientError, match=r"run vanished, or its run\.lock was deleted"):
            held.check()


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with WorkdirLock(tmp_path), pytest.raises(UserError, match="in use by another run"):
        WorkdirLock(tmp_path).acquire()


def test_the_lock_tells_one_boot_and_container_from_others() -> None:
    assert re.fullmatch(r"[0-9a-f-]{36} pid:\[\d+\]", lock._machine())
