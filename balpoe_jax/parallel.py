# SPDX-License-Identifier: Apache-2.0
"""One pure per-device function on all devices of this host: mesh, placement and mapping.

`pmap` is the default; `shard_map` is its twin on jit. Both give the same numbers, and both keep the
state without a device axis, so it can be saved and restored as it is.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from balpoe_jax.errors import UserError

MODES = ("pmap", "shard_map")
AXIS_NAME = "devices"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The devices that share a batch, and the verbs to use them.

    Attributes:
        mode: "pmap" or "shard_map".
        mesh: one-dimensional, its axis is `AXIS_NAME`.
    """

    mode: str
    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """Devices that share a batch."""
        return self.mesh.size

    @property
    def replicated(self) -> NamedSharding:
        """The placement of a state: a whole copy on each device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def sharded(self) -> NamedSharding:
        """The placement of a batch: cut along the leading axis."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS_NAME))

    def check_batch_size(self, batch_size: int, name: str, accumulate: int = 1) -> None:
        """Refuses a global batch that the devices, and their microbatches, cannot share equally."""
        if batch_size < 1 or batch_size % (self.num_devices * accumulate):
            times, microbatches = "", ""
            if accumulate > 1:
                times, microbatches = " times optim.accumulate", f" x {accumulate}"
            raise UserError(
                f"{name} must be a positive multiple of the number of devices{times}, got "
                f"{batch_size} for {self.num_devices}{microbatches}; choose another batch size or "
                f"fewer {'microbatches or ' if accumulate > 1 else ''}devices."
            )

    def replicate(self, tree: Any) -> Any:
        """A copy of `tree` on every device."""
        return jax.device_put(tree, self.replicated)

    def shard(self, batch: Any) -> Any:
        """Cuts arrays `[B, ...]` along their first axis and places the parts on the devices."""
        if self.mode == "pmap":  # which wants the device axis as an axis of its own
            batch = jax.tree.map(
                lambda x: x.reshape(self.num_devices, x.shape[0] // self.num_devices, *x.shape[1:]),
                batch,
            )
        return jax.device_put(batch, self.sharded)

    def map_step(self, step: Callable[..., Any], donate: bool = False) -> Callable[..., Any]:
        """Maps `step(replicated, batch_part) -> replicated` over the devices, compiled.

        Args:
            step: pure; its results must be equal on all devices. Under `shard_map` that is
                proved at compilation, under `pmap` nothing checks it.
            donate: the memory of the first argument may be reused: do not touch it afterwards.
        """
        donated = (0,) if donate else ()
        if self.mode == "pmap":
            return jax.pmap(
                step,
                axis_name=AXIS_NAME,
                in_axes=(None, 0),
                out_axes=None,
                donate_argnums=donated,
                devices=list(self.mesh.devices.flat),
            )
        replicated, cut = PartitionSpec(), PartitionSpec(AXIS_NAME)
        mapped = jax.shard_map(
            step, mesh=self.mesh, in_specs=(replicated, cut), out_specs=replicated
        )
        return jax.jit(mapped, donate_argnums=donated)


def make_parallel(mode: str = "pmap", devices: Iterable[jax.Device] | None = None) -> Parallel:
    """All local devices, or the given ones, behind one axis.

    Raises:
        UserError (a `ValueError`): an unknown mode, or several processes, which would each train a
            model of their own.
    """
    if mode not in MODES:
        raise UserError(f"Unknown parallel mode {mode!r}; choose from {', '.join(MODES)}.")
    if jax.process_count() > 1:
        raise UserError(
            f"Training runs on the devices of one host so far, got {jax.process_count()} JAX "
            "processes; start it on a single host."
        )
    chosen = jax.local_devices() if devices is None else list(devices)
    return Parallel(mode, Mesh(np.array(chosen), (AXIS_NAME,)))


class Prefetcher:
    """Iterates over batches that are on the devices before they are asked for.

    Attributes:
        waited: seconds that the caller has waited for input so far.
    """

    def __init__(self, batches: Iterable[Any], parallel: Parallel, depth: int = 2) -> None:
        self.waited = 0.0
        self._batches = iter(batches)
        self._parallel = parallel
        self._depth = depth
        self._ready: collections.deque[Any] = collections.deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        while len(self._ready) < self._depth:
            try:
                self._ready.append(self._parallel.shard(next(self._batches)))
            except StopIteration:
                break
        self.waited += time.perf_counter() - start
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()
