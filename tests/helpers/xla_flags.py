# SPDX-License-Identifier: Apache-2.0
"""Flags with which XLA compiles small programs quickly."""

import os

import jaxlib
import pytest


def quick_flags(config: pytest.Config) -> str:
    """Flags of XLA that compile small programs twice as fast, and large ones no slower.

    Code in one piece, and not in a piece for each core, is made in a tenth less time on one core.
    """
    # Other versions may not know the flag, and exit.
    known = jaxlib.__version__.startswith("0.10.") and not config.getoption("--all")
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    return flags if known else ""


def flags_of_xla(flags: str) -> dict[str, str]:
    """The environment variable with these flags added, for JAX and the processes of tests.

    It is left out if there are no flags: XLA takes a blank value for the name of a file of flags.
    """
    every = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    return {"XLA_FLAGS": every} if every else {}
