# SPDX-License-Identifier: Apache-2.0
"""The user's cache folder: for downloads and indices, which can be made again."""

import os
from pathlib import Path


def folder() -> Path:
    """`$XDG_CACHE_HOME/balpoe_jax`, by default `~/.cache/balpoe_jax`; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "balpoe_jax"
