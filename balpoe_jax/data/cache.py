# SPDX-License-Identifier: Apache-2.0
"""The folder in which data are kept that can be had again."""

import os
from pathlib import Path


def folder() -> Path:
    """`$XDG_CACHE_HOME/balpoe_jax`, `~/.cache/balpoe_jax` by default; it need not be there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "balpoe_jax"
