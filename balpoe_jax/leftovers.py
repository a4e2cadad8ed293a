# SPDX-License-Identifier: Apache-2.0
"""Names of files that are being written, and what a killed process leaves of them."""

import contextlib
import os
import socket
from pathlib import Path


def temporary(path: Path) -> Path:
    """A name of this process's own beside `path`, hidden."""
    return path.with_name(f"{_of_this_host()}{os.getpid()}.{path.name}")


def clear(*folders: Path) -> None:
    """Deletes what processes of this host left that do not live any more."""
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
