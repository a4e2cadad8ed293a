# SPDX-License-Identifier: Apache-2.0
"""The surroundings of a run: versions, devices, source, command."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import balpoe_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-cpu")


def environment() -> dict[str, Any]:
    """Versions and source of this process, and the devices of all processes."""
    devices = jax.devices()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "balpoe_jax": balpoe_jax.__version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "platform": devices[0].platform,
        "runtime": devices[0].client.platform_version,
        "driver": _driver(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "process_count": jax.process_count(),
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The NVIDIA driver's own line about its version; None without a driver."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None


def _git_commit() -> str | None:
    """The commit of the source, with "+" when files were changed; None outside a repository."""
    root = Path(balpoe_jax.__file__).parent
    try:
        # An installed package may lie inside a repository that is not its own.
        tracked = ["git", "ls-files", "--error-unmatch", "__init__.py"]
        subprocess.run(tracked, cwd=root, capture_output=True, timeout=10, check=True)
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
