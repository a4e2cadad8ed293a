# SPDX-License-Identifier: Apache-2.0
"""GPUs to compile for without having one, and their capabilities."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jaxlib

from balpoe_jax.errors import UserError

_PLUGIN = "jax-cuda13-plugin"
_CUDA = 13  # of the plugin


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A card, as its maker publishes it.

    Attributes:
        name: Name in CUDA.
        capability: Compute capability, major and minor.
        multiprocessors: Number of multiprocessors.
        units: Number of float32 units of a multiprocessor.
        clock_ghz: Boost clock in GHz.
        hbm_bytes: Memory in bytes.
        bandwidth: Bandwidth of the memory in bytes a second.
        l2_bytes: Second-level cache in bytes.
        shared_bytes: Shared memory of a multiprocessor in bytes; a block may have 1 KiB less.
        peak_flops: Operations a second in bfloat16 without sparsity, a multiply-add being two; half
            as many in TF32.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    units: int
    clock_ghz: float
    hbm_bytes: int
    bandwidth: float
    l2_bytes: int
    shared_bytes: int
    peak_flops: float

    @property
    def target(self) -> str:
        """XLA's description of it, a `GpuTargetConfigProto` as text."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_bytes}
  threads_per_core_limit: 2048
  core_count: {self.multiprocessors}
  fpus_per_core: {self.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.hbm_bytes}
  shared_memory_per_block_optin: {self.shared_bytes - 1024}
  cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: {_CUDA} minor: 0 patch: 0 }}
device_description_str: "{self.name}"
"""


_MIB = 2**20

GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 84974239744, 2.039e12, 40 * _MIB,
        164 * 1024, 312e12,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 84942979072, 3.352e12, 50 * _MIB,
        228 * 1024, 989e12,
    ),
    "h200": Gpu(
        "NVIDIA H200", (9, 0), 132, 128, 1.98, 150754820096, 4.8e12, 50 * _MIB, 228 * 1024, 989e12
    ),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), 148, 128, 1.965, 191503007744, 8e12, 126 * _MIB, 228 * 1024,
        2250e12,
    ),
}  # fmt: skip

_NUMBERS = (1, 2, 4, 8)  # of cards in one host

TOPOLOGIES = tuple(
    name if number == 1 else f"{name}:{number}" for name in GPUS for number in _NUMBERS
)


def compile_only_devices(topology: str) -> list[jax.Device]:
    """Devices of a topology that programs can be compiled for, and that cannot run them.

    Args:
        topology: Name of a topology, one of `TOPOLOGIES`, such as "h100" or "h100:8".

    Raises:
        UserError (a `ValueError`): no CUDA compiler on this machine, or one of another version.
    """
    _check_plugin()
    _find_ptxas()
    # JAX would check the versions of CUDA's libraries, which matter only to a program that runs.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    name, _, number = topology.partition(":")
    description = topologies.get_topology_desc(
        platform="cuda", target_config=GPUS[name].target, topology=f"1x1x{number or 1}"
    )
    return list(description.devices)


def _check_plugin() -> None:
    wanted = jaxlib.__version__
    try:
        version = importlib.metadata.version(_PLUGIN)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != wanted:
        there = "is not installed" if version is None else f"is {version} here"
        raise UserError(
            f"Compiling for a GPU needs {_PLUGIN} of JAX's version, {wanted}, which {there}; "
            f'install it with pip install "{_PLUGIN}=={wanted}" "nvidia-cuda-nvcc>={_CUDA}" (no '
            "GPU is needed)."
        )


def _find_ptxas() -> None:
    """Makes sure that XLA finds CUDA's assembler, perhaps in the package nvidia-cuda-nvcc."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():  # type: ignore[union-attr]
        packaged = Path(folder) / f"cu{_CUDA}" / "bin"
        if (packaged / "ptxas").exists() and str(packaged) not in os.environ.get("PATH", ""):
            os.environ["PATH"] = f"{packaged}{os.pathsep}{os.environ.get('PATH', '')}"
    path = shutil.which("ptxas")
    if path is None:
        raise UserError(
            "Compiling for a GPU needs CUDA's assembler ptxas, which is not on the PATH; install "
            f'it with pip install "nvidia-cuda-nvcc>={_CUDA}" (no GPU is needed).'
        )
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", told)
    if release is None or int(release[1]) < _CUDA:
        raise UserError(
            f"Compiling for a GPU needs ptxas of CUDA {_CUDA} or later, got "
            f"{f'CUDA {release[1]}' if release else 'one that does not tell'} ({path}); install "
            f'pip install "nvidia-cuda-nvcc>={_CUDA}".'
        )
