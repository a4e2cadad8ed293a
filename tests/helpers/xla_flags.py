# SPDX-License-Identifier: Apache-2.0
"""Flags with which XLA compiles small programs quickly."""

import os

import jaxlib
import pytest


def quick_flags(config: pytest.Config) -> str:
    """Flags of XLA with which small programs are compiled twice as fast, and large ones as fast."""
    # Other versions may end at a flag that they do not know.
    known = jaxlib.__version__.startswith("0.10.") and not config.getoption("--all")
    return "--xla_cpu_use_fusion_emitters=false" if known else ""


def flags_of_xla(flags: str) -> dict[str, str]:
    """The variable that adds flags to those of the environment, for JAX and processes of tests.

    Without any it is left out: XLA takes a value that is blank for the name of a file of flags.
    """
    every = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    return {"XLA_FLAGS": every} if every else {}
