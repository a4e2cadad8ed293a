# SPDX-License-Identifier: Apache-2.0
"""Set-up of the whole test run: four CPU devices, and no silent broadcasting between ranks."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before JAX starts, and for the processes that tests start. The tests' numbers are those of a CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test has compiled serves the others, and the next run: most of their time is compilation.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs one test in double precision."""
    with jax.enable_x64(True):
        yield
