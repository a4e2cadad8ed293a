# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a workdir: `run.lock` says whose it is.

It relies on one thing, that a file of a name can be created only once, so it also holds between
hosts that share storage. Whether its owner lives, the kernel says, if both have the same one. The
file of an owner on another host, or in another container, is watched: its owner touches it every
few seconds. No clock is compared with another, so none has to be right.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from balpoe_jax.errors import TransientError, UserError
from balpoe_jax.files import reports_write_errors
from balpoe_jax.run import multihost

LOCK = "run.lock"
_BEAT_SECONDS = 5.0
_SILENT_SECONDS = 60.0  # of an owner elsewhere until it counts as dead

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host: Name of the host, for people.
        machine: Boot of a kernel, and container on it, within which `pid` means something.
        pid, started: Number of a process, which its kernel uses again, and the tick of its start.
        since: Date and time at which it took the lock, for people.
        token: Text that no other lock has.
    """

    host: str
    machine: str
    pid: int
    started: str
    since: str
    token: str

    @classmethod
    def of_this_process(cls) -> "Owner":
        """This process as a new owner."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid), now, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class WorkdirLock:
    """The right to write a run into a workdir, as a context.

    Args:
        workdir: Folder of the run; it must exist.
        silent_seconds: Seconds without a sign of life until an owner elsewhere counts as dead.
        beat_seconds: Seconds between this owner's signs of life.
    """

    def __init__(
        self,
        workdir: Path,
        silent_seconds: float = _SILENT_SECONDS,
        beat_seconds: float = _BEAT_SECONDS,
    ) -> None:
        self._path = workdir / LOCK
        self._silent_seconds, self._beat_seconds = silent_seconds, beat_seconds
        self._owner = Owner.of_this_process()
        self._watched: tuple[object, int | None, float] = (None, None, 0.0)
        self._held = threading.Event()
        self._released = threading.Event()

    def __enter__(self) -> "WorkdirLock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock, even from a dead owner. Every process must call this; the first takes it.

        Raises:
            UserError (a `ValueError`): its owner lives, or the file cannot be written.
        """
        # In short turns, since processes do not wait long for each other.
        while not multihost.broadcast_text(lambda: "taken" if self._try() else ""):
            time.sleep(min(1.0, self._silent_seconds / 10))

    def _try(self) -> bool:
        """Whether the lock could be taken; if not, it is to be tried again soon."""
        chain = self._chain()
        if chain:
            path, before = chain[-1]
            if self._lives(path, before) or not self._succeed(chain):
                return False
            log.info("Took over the workdir from a run that is gone (%s)", before or "unknown")
        elif not self._create(self._path):
            return False
        self._clear_away()
        self._held.set()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return True

    def check(self) -> None:
        """Raises UserError if this run no longer has the lock, or the workdir is gone."""
        if not self._held.is_set():
            return
        owner = _read(self._path)
        if owner is not None and owner.token == self._owner.token:
            return
        if not self._path.exists():
            raise TransientError(
                f"The workdir {self._path.parent} vanished, or its {LOCK} was deleted, while the "
                "run went on; bring it back and start again to go on from its last checkpoint."
            )
        raise UserError(
            f"The workdir {self._path.parent} was taken over by another run ({owner}); this one "
            "stops and leaves it alone."
        )

    def release(self) -> None:
        """Gives the lock back; does nothing if it is not held."""
        self._released.set()
        if not self._held.is_set():
            return
        self._held.clear()
        owner = _read(self._path)
        if owner is not None and owner.token == self._owner.token:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _chain(self) -> list[tuple[Path, Owner | None]]:
        """The lock's file, and after it those of the processes that took it over one by one.

        A takeover is a file named after the lock before it, which only one process can create: so
        no second one can take the same dead owner for its own.
        """
        chain: list[tuple[Path, Owner | None]] = []
        path = self._path
        while path.exists():
            owner = _read(path)
            chain.append((path, owner))
            path = path.with_name(f".{LOCK}.after-{owner.token if owner else 'unreadable'}")
            if any(path == earlier for earlier, _ in chain):
                break
        return chain

    def _succeed(self, chain: list[tuple[Path, Owner | None]]) -> bool:
        """Takes over from the last of a chain, unless another process was quicker."""
        last = chain[-1][1]
        mine = self._path.with_name(f".{LOCK}.after-{last.token if last else 'unreadable'}")
        if not self._create(mine):
            return False
        now = self._chain()
        # An earlier successor may have made itself the lock, and cleared the chain away.
        if not now or now[-1][1] is None or now[-1][1].token != self._owner.token:
            mine.unlink(missing_ok=True)
            return False
        self._write(self._path)
        for path, _ in reversed(now[1:]):
            path.unlink(missing_ok=True)
        return True

    def _create(self, path: Path) -> bool:
        """Writes this owner to a file that must not be there yet, at once as a whole."""
        temporary = path.with_name(f".{LOCK}.{self._owner.token}")
        try:
            with reports_write_errors(self._path):
                temporary.write_text(self._content(), encoding="utf-8")
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                except OSError:  # a file system without links
                    try:
                        with path.open("x", encoding="utf-8") as file:
                            file.write(self._content())
                    except FileExistsError:
                        return False
                return True
        finally:
            temporary.unlink(missing_ok=True)

    def _write(self, path: Path) -> None:
        temporary = path.with_name(f".{LOCK}.{self._owner.token}")
        with reports_write_errors(path):
            temporary.write_text(self._content(), encoding="utf-8")
            os.replace(temporary, path)

    def _content(self) -> str:
        return json.dumps(dataclasses.asdict(self._owner)) + "\n"

    def _lives(self, path: Path, owner: Owner | None) -> bool:
        """Whether an owner must be left alone for now; raises UserError if it lives."""
        if owner is not None and owner.machine and owner.machine == _machine():
            if _started(owner.pid) != owner.started:
                return False
            raise self._in_use(owner)
        touched, now = _touched(path), time.monotonic()
        watched, seen, since = self._watched
        if watched != (path, owner):
            self._watched = (path, owner), touched, now
            log.info(
                "The workdir has the lock of %s; watching for %g seconds whether that run lives",
                owner or "an unknown run",
                self._silent_seconds,
            )
        elif touched != seen:
            if path.exists():
                raise self._in_use(owner)
        elif now - since >= self._silent_seconds:
            return False
        return True

    def _in_use(self, owner: Owner | None) -> UserError:
        return UserError(
            f"The workdir {self._path.parent} is in use by another run "
            f"({owner or 'its lock cannot be read'}); wait for it to end, stop it, or choose "
            "another --workdir."
        )

    def _clear_away(self) -> None:
        """Removes what is left of runs that were killed while they took the lock."""
        for path in self._path.parent.glob(f".{LOCK}.*"):
            if path.name != f".{LOCK}.after-{self._owner.token}":
                path.unlink(missing_ok=True)

    def _beat(self) -> None:
        """Touches the lock, as long as this process has it."""
        while not self._released.wait(self._beat_seconds):
            owner = _read(self._path)
            if owner is not None and owner.token == self._owner.token:
                with contextlib.suppress(OSError):
                    os.utime(self._path)


def _read(path: Path) -> Owner | None:
    """The owner of a lock; None if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(**content)
    except (OSError, ValueError, TypeError):
        return None
    texts = (owner.host, owner.machine, owner.started, owner.since, owner.token)
    if not all(isinstance(text, str) for text in texts) or not isinstance(owner.pid, int):
        return None
    return owner if owner.token.isalnum() else None


def _touched(path: Path) -> int | None:
    """When a file was last touched; opened first, so that storage on a network looks afresh."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _machine() -> str:
    """A text that no other boot of a kernel, and no other container on it, has."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> str:
    """The start of a process, in ticks since its kernel's; empty if no such process lives."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return "" if state in "ZX" else fields[18]
