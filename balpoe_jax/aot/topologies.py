# SPDX-License-Identifier: Apache-2.0
"""TPU slices to compile for without having one, and the capabilities of their chips."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax

from balpoe_jax.aot import gpus
from balpoe_jax.errors import UserError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A JAX device of one generation of TPUs.

    Attributes:
        hbm_bytes: Published memory in bytes (programs get a little less).
        peak_flops: Published operations a second in bfloat16, a multiply-add being two. By default
            products in float32 are also made of bfloat16 ones.
        flops_per_cycle: Operations of its matrix units in a cycle. The compiler's estimates for
            large matrix products come within 13% of it (measured with libtpu 0.0.42).
        slices: Grids of the topologies that are offered.
    """

    hbm_bytes: int
    peak_flops: float
    flops_per_cycle: int
    slices: tuple[str, ...]

    @property
    def clock_hertz(self) -> float:
        """Cycles a second."""
        return self.peak_flops / self.flops_per_cycle


_UNIT = 2 * 128 * 128  # operations a cycle of the matrix unit before v6e, which has four times it

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")

_NO_HOST = {
    # libtpu would ask the host of a TPU for these, and complain when there is none. The accelerator
    # is not that of the topology, which JAX asks for by name.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # A lock lets one process at a time load libtpu, since a chip serves one process. A compiler
    # opens no chip: it need not wait for another process that trains or compiles, nor stop it.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. The compiler's devices are the two
# cores of a chip on v4, and whole chips on the others.
CHIPS = {
    "v4": Chip(16 * _GIB, 275e12 / 2, 4 * _UNIT, _CUBIC),
    "v5e": Chip(16 * _GIB, 197e12, 4 * _UNIT, _FLAT),
    "v5p": Chip(95 * _GIB, 459e12, 8 * _UNIT, _CUBIC),
    "v6e": Chip(32 * _GIB, 918e12, 16 * _UNIT, _FLAT),
}

TOPOLOGIES = tuple(f"{name}:{grid}" for name, chip in CHIPS.items() for grid in chip.slices)


def chip_of(topology: str) -> Chip:
    """The chip of a topology; raises UserError with the known ones if it is none of them."""
    if topology not in TOPOLOGIES:
        known = "; ".join(
            f"{name}: {', '.join(f'{name}:{grid}' for grid in chip.slices)}"
            for name, chip in CHIPS.items()
        )
        raise UserError(
            f"Unknown topology {topology!r}; choose one of {known}; GPUs: "
            f"{', '.join(gpus.TOPOLOGIES)}."
        )
    return CHIPS[topology.partition(":")[0]]


def compile_only_devices(topology: str) -> list[jax.Device]:
    """Devices of a topology that programs can be compiled for, and that cannot run them.

    Raises:
        UserError (a `ValueError`): an unknown topology, no TPU compiler on this machine, that of
            another JAX, or one that cannot be loaded.
    """
    chip_of(topology)
    _check_compiler()
    from jax.experimental import topologies

    for name, value in _NO_HOST.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.endswith(":1x1"):  # fewer chips than a host has
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" not in str(error) and "in use" not in str(error):
            raise
        raise UserError(
            "Another process has the TPU compiler (libtpu) to itself; wait for it to end, or unset "
            "ALLOW_MULTIPLE_LIBTPU_LOAD, which keeps it so here."
        ) from error


def _check_compiler() -> None:
    """Raises UserError if libtpu is missing, or not of the versions that this JAX asks for."""
    asked = _versions_of_libtpu()
    package = f"libtpu=={asked}" if asked else f"jax[tpu]=={jax.__version__}"
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "Compiling for a TPU needs its compiler, the package libtpu, which is not installed; "
            f'install it with pip install "{package}" (no TPU is needed).'
        )
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return  # one that was not installed as a package
    if asked and not f"{found}.".startswith(f"{asked.removesuffix('.*')}."):
        raise UserError(
            f"JAX {jax.__version__} compiles for a TPU with libtpu {asked}, and libtpu {found} is "
            f'installed; install that of this JAX with pip install "{package}".'
        )


def _versions_of_libtpu() -> str | None:
    """The pattern of versions in JAX's extra `tpu`, as in `libtpu==0.0.42.*`; None if it has none.

    Each JAX is compiled for one version of the interface to libtpu, and names what has it.
    """
    for requirement in importlib.metadata.requires("jax") or ():
        found = re.match(r"libtpu\s*==\s*([\w.*+!]+)", requirement)
        if found:
            return found[1]
    return None
