# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: they start together, agree, and end together.

The functions that agree are collective: every process must call them, in the same order. With one
process they cost nothing. Process 0 is the first: it alone logs and writes the record of a run.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from balpoe_jax.errors import Preempted, TransientError, UserError
from balpoe_jax.run import key_value_store

_FAILURE, _LEFT, _END = "balpoe_jax/failure", "balpoe_jax/left", "balpoe_jax/end"
_POLL_SECONDS = 0.5
_LINGER_SECONDS = 5.0  # that process 0 stays reachable for the others to read why it failed
_SHARED_SECONDS = 5.0  # until a file on shared storage must be seen by all
_YEAR_SECONDS = 365 * 24 * 3600
_MESSAGE_BYTES = 2048


@contextlib.contextmanager
def process_group(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_seconds: int = 60,
    start_timeout_seconds: int = 300,
    report: Callable[[BaseException], int],
) -> Iterator[None]:
    """Joins this process to the others, before any use of JAX, until all have left the context.

    An error in one process ends all of them: they print whose error it was and exit at once. If one
    vanishes without a word, the others end as soon as the network says so, after
    `heartbeat_timeout_seconds` at the latest.

    Args:
        coordinator_address: Address `HOST:PORT` of process 0. If this and the next two are None,
            JAX asks the cluster: TPU pods, those of GKE too, Slurm, Open MPI.
        num_processes, process_id: Number of processes, and the number of this one.
        heartbeat_timeout_seconds: Seconds without a sign of life until a process counts as dead.
        start_timeout_seconds: Seconds in which all processes must join.
        report: Function that prints an error and returns the exit code that it calls for.

    Raises:
        UserError (a `ValueError`): an address that cannot be used, or a cluster that JAX does not
            know.
        TransientError (a `UserError`): the processes do not find each other.
    """
    _initialize(
        coordinator_address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds,
        start_timeout_seconds,
        report,
    )
    finished = threading.Event()
    watch = threading.Thread(target=_watch, args=(finished,), name="watch", daemon=True)
    watch.start()
    try:
        yield
        _wait_for_all()
    except Preempted:  # which all processes raise at the same step
        _wait_for_all()
        raise
    except BaseException as error:
        finished.set()
        watch.join()
        stop_all(error, report)
    finally:
        finished.set()
        watch.join()


def count() -> int:
    """Number of processes. A lone process does not ask JAX, which would occupy its devices."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes the record of the run."""
    return count() == 1 or jax.process_index() == 0


def run_on_process_0(function: Callable[[], Any]) -> None:
    """Calls `function` in process 0 alone; a `UserError` of it is raised in all processes."""
    kind, message = "", ""
    if is_first():
        try:
            function()
        except UserError as error:
            if count() == 1:
                raise
            kind = "passing" if isinstance(error, TransientError) else "lasting"
            message = str(error)
    kind, _, message = _broadcast(f"{kind} {message}").partition(" ")
    if kind:
        raise (TransientError if kind == "passing" else UserError)(message)


def broadcast_bool(question: Callable[[], bool]) -> bool:
    """The answer of process 0, in all processes, such as whether a file is there."""
    answer = is_first() and question()
    return bool(_broadcast("yes" if answer else ""))


def broadcast_text(question: Callable[[], str]) -> str:
    """The answer of process 0, in all processes; a `UserError` of it is raised in all of them."""
    answers: list[str] = []
    run_on_process_0(lambda: answers.append(question()))
    return _broadcast(answers[0] if answers else "")


def check_same(value: Any, what: str, remedy: str, error: type[UserError] = UserError) -> None:
    """Refuses processes that have different values.

    Args:
        value: Value that JSON can hold.
        what: Name of the value in the message.
        remedy: Advice in the message.
        error: Class of the error that is raised.

    Raises:
        UserError (a `ValueError`), or `error`: in all processes.
    """
    if count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    differing = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
    if differing:
        raise error(
            f"All processes must have the same {what}, and that of process 0 is not that of "
            f"{_names(differing)}; {remedy}."
        )


def check_shared(folder: Path) -> None:
    """Refuses a folder that is not the same one for all processes.

    Raises:
        UserError (a `ValueError`): in all processes.
    """
    if count() == 1:
        return
    mark = folder / f".shared-{_broadcast(secrets.token_hex(8))}"
    run_on_process_0(mark.touch)
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    by_process = multihost_utils.process_allgather(np.array(seen))
    if is_first():
        mark.unlink(missing_ok=True)
    if not by_process.all():
        blind = np.flatnonzero(~by_process).tolist()
        raise UserError(
            f"The workdir must be one folder on storage that all processes share, and what process "
            f"0 wrote into {folder} is not seen by {_names(blind)}; choose another --workdir."
        )


def is_of_jax(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is of a computation or a connection of JAX.

    Such an error says nothing about this process: another one may have died.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or _is_bare_status(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_bare_status(error: BaseException) -> bool:
    """Whether an error is a failed call of JAX's fast path, such as `UNKNOWN: Gloo ...`.

    TensorStore words its errors in the same way, but they come from no frame of JAX or of ours.
    """
    if not isinstance(error, ValueError) or not re.match(r"[A-Z_]+: ", str(error)):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    where = frames[-1].f_globals["__name__"] if frames else ""
    return where.partition(".")[0] in ("jax", "balpoe_jax")


def _initialize(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_timeout_seconds: int,
    start_timeout_seconds: int,
    report: Callable[[BaseException], int],
) -> None:
    explicit = coordinator_address is not None
    if coordinator_address is not None:
        _check_address(coordinator_address, process_id == 0)
    # JAX itself would end the process when time is up, with a page of its internal state.
    too_late = threading.Timer(start_timeout_seconds, _give_up, (start_timeout_seconds, report))
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if explicit else None,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            initialization_timeout=2 * start_timeout_seconds,
        )
    except Exception as error:  # each cluster's detection raises its own kinds
        reason = " ".join(str(error).split())[:300]
        wanted = (
            f"is {coordinator_address} process 0, and were all {num_processes} processes started?"
            if explicit
            else "name --coordinator_address, --num_processes and --process_id where JAX does not "
            "know the cluster."
        )
        kind = TransientError if isinstance(error, jax.errors.JaxRuntimeError) else UserError
        raise kind(f"The processes did not find each other ({reason}); {wanted}") from error
    finally:
        too_late.cancel()


def _check_address(coordinator_address: str, here: bool) -> None:
    """Refuses an invalid address and, in process 0, a port in use, which would crash JAX."""
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator_address must be HOST:PORT, got {coordinator_address!r}.")
    if not here:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"Process 0 cannot use port {port} of this host ({error}); give all processes "
                "another --coordinator_address=HOST:PORT."
            ) from error


def _give_up(seconds: float, report: Callable[[BaseException], int]) -> None:
    code = report(
        TransientError(
            f"The processes did not find each other within {seconds:g} seconds; were all started, "
            "with the same --num_processes and the --coordinator_address of process 0?"
        )
    )
    sys.stderr.flush()
    os._exit(code)


def _wait_for_all() -> None:
    """Waits for the last process: process 0 writes results long after the others' last step.

    JAX would also wait, but it gives up after some minutes.
    """
    key_value_store.wait_for_all(_END, _YEAR_SECONDS)


def _watch(finished: threading.Event) -> None:
    """Ends this process once another one says that it failed."""
    while not finished.wait(_POLL_SECONDS):
        failure = _read_failure()
        if failure and not finished.is_set():
            _leave(failure)


def stop_all(error: BaseException, report: Callable[[BaseException], int]) -> NoReturn:
    """Reports this process's error, or the error elsewhere that caused it, and exits."""
    failure = _read_failure()
    computing = is_of_jax(error)
    if failure and computing:
        _leave(failure)  # a broken connection is not the cause
    code = report(error)
    if computing:
        print(
            f"Error: process {jax.process_index()} of {count()} stops because a computation "
            "failed; where a connection was closed, another process died: see its last words.",
            file=sys.stderr,
        )
    sentence = " ".join(str(error).split()) or type(error).__name__
    content = {"process": jax.process_index(), "code": code, "message": sentence[:_MESSAGE_BYTES]}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one came first
        key_value_store.put(_FAILURE, json.dumps(content))
    _exit(code)


def _read_failure() -> dict[str, Any] | None:
    """The failure that another process has reported; None if none has."""
    text = key_value_store.get(_FAILURE)
    failure = json.loads(text) if text else None
    return failure if failure and failure["process"] != jax.process_index() else None


def _leave(failure: dict[str, Any]) -> NoReturn:
    print(
        f"Error: process {jax.process_index()} of {count()} stops because process "
        f"{failure['process']} failed: {failure['message']}",
        file=sys.stderr,
    )
    _exit(failure["code"])


def _exit(code: int) -> NoReturn:
    """Ends this process without JAX's shutdown, which waits minutes for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        key_value_store.put(f"{_LEFT}/{jax.process_index()}", "")
        # Process 0 holds the store: when it goes first, the others lose the message.
        deadline = time.monotonic() + (_LINGER_SECONDS if is_first() else 0)
        while time.monotonic() < deadline:
            if key_value_store.count(_LEFT) == count():
                break
            time.sleep(0.1)
    os._exit(code)


def _broadcast(text: str) -> str:
    """The text of process 0, in all processes, cut to a size that all know beforehand."""
    if count() == 1:
        return text
    padded = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8))
    return received.tobytes().rstrip(b"\0").decode(errors="ignore")


def _names(processes: list[int]) -> str:
    shown = ", ".join(str(process) for process in processes[:8])
    more = f" and {len(processes) - 8} more" if len(processes) > 8 else ""
    return f"process {shown}{more}"
