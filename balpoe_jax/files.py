# SPDX-License-Identifier: Apache-2.0
"""Files that are written as a whole or not at all, JSON, and temporary names."""

import contextlib
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from balpoe_jax.errors import TransientError, UserError, is_transient

# The names of a run's files in its workdir.
CONFIG, METRICS, DISCARDED, RESULTS, LOG = (
    "config.json",
    "metrics.jsonl",
    "metrics.discarded.jsonl",
    "results.json",
    "train.log",
)


@contextlib.contextmanager
def reports_write_errors(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write a file or folder into a `UserError`.

    The error is a `TransientError` if `is_transient` says so of the refusal.
    """
    try:
        yield
    except OSError as error:
        raise (TransientError if is_transient(error) else UserError)(
            f"{path} cannot be written ({error.strerror or error}); move away what is in its "
            "place, make room, or choose another folder."
        ) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # recursion: thousands of brackets
        return None
    return content if isinstance(content, dict) else None


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole, so that no reader ever sees half of it.

    Raises:
        UserError (a `ValueError`): the file cannot be written.
    """
    partial = temporary(path)
    with reports_write_errors(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # or a power cut leaves the new name without the content
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def to_json(value: Any) -> Any:
    """Values that JSON can hold: tuples become lists, arrays lists, and not-a-number null."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def temporary(path: Path) -> Path:
    """A hidden name next to `path`, of this process's own."""
    return path.with_name(f"{_of_this_host()}{os.getpid()}.{path.name}")


def clear(*folders: Path) -> None:
    """Deletes temporary files of this host's processes that have ended."""
    for folder in folders:
        for path in folder.glob(f"{_of_this_host()}*"):
            pid = path.name.removeprefix(_of_this_host()).partition(".")[0]
            if pid.isdecimal() and not _lives(int(pid)):
                with contextlib.suppress(OSError):
                    path.unlink()


def _of_this_host() -> str:
    return f".{socket.gethostname()}."


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
