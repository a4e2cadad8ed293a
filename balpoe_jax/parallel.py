# SPDX-License-Identifier: Apache-2.0
"""One pure per-device function on all devices of all processes: mesh, placement and mapping.

`pmap` is the default; `shard_map` is its twin on jit. Both give the same numbers, and both keep the
state without a device axis. With several processes a state under `pmap` consists of local arrays,
one equal copy in each process, which `to_local_arrays` turns into what can be saved, and back.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
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
        mode: Way of mapping, "pmap" or "shard_map".
        mesh: Mesh of one axis, `AXIS_NAME`; the devices of a process are neighbours.
    """

    mode: str
    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """Number of devices that share a batch, in all processes."""
        return self.mesh.size

    @property
    def platform(self) -> str:
        """Kind of the devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def num_hosts(self) -> int:
        """Number of processes that share a batch; each makes the input of its own devices."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def replicated(self) -> NamedSharding:
        """The placement of a state: a whole copy on each device."""
        return NamedSharding(self._placement, PartitionSpec())

    @property
    def sharded(self) -> NamedSharding:
        """The placement of a batch: cut along the leading axis."""
        return NamedSharding(self._placement, PartitionSpec(AXIS_NAME))

    @property
    def _placement(self) -> Mesh:
        """The devices that arrays are placed on; with several hosts, pmap's are the local ones."""
        several = self.mode == "pmap" and self.num_hosts > 1
        return self.mesh.local_mesh if several else self.mesh

    def check_batch_size(self, batch_size: int, name: str, accumulate: int = 1) -> None:
        """Refuses a global batch that devices and microbatches cannot share equally."""
        if batch_size < 1 or batch_size % (self.num_devices * accumulate):
            times, microbatches = "", ""
            if accumulate > 1:
                times, microbatches = " times optim.accumulation_steps", f" x {accumulate}"
            raise UserError(
                f"{name} must be a positive multiple of the number of devices{times}, got "
                f"{batch_size} for {self.num_devices}{microbatches}; choose another batch size or "
                f"fewer {'microbatches or ' if accumulate > 1 else ''}devices."
            )

    def replicate(self, tree: Any) -> Any:
        """A copy of `tree` on every device."""
        return jax.device_put(tree, self.replicated)

    def shard(self, batch: Any, axis: int = 0) -> Any:
        """Cuts arrays along the axis of their rows and places the parts on the devices.

        Args:
            batch: This process's rows of the global batch, arrays `[b, ...]`; with axis 1 of
                several, `[K, b, ...]`.
            axis: The axis of the rows, 0 or 1.
        """
        if self.mode == "pmap":  # which wants a leading axis of devices
            cut = partial(_split, parts=self._placement.size, axis=axis)
            return jax.device_put(jax.tree.map(cut, batch), self.sharded)
        placement = NamedSharding(self._placement, _rows(axis))
        if self.num_hosts > 1:
            # An explicit transfer, which JAX takes for an implicit one where rows are not first.
            with jax.transfer_guard_host_to_device("allow"):
                return jax.make_array_from_process_local_data(placement, batch)
        return jax.device_put(batch, placement)

    def map_step(
        self, step: Callable[..., Any], donate: bool = False, constants: int = 0, axis: int = 0
    ) -> Callable[..., Any]:
        """Maps `step(replicated, batch_part, *constants) -> replicated` over the devices, compiled.

        Args:
            step: Pure function; its results must be equal on all devices. Under `shard_map` that
                is proved at compilation, under `pmap` nothing checks it.
            donate: Whether the memory of the first argument may be reused: do not touch it then.
            constants: Number of further arguments, which each device has a whole copy of.
            axis: The axis of the batch's rows, as `shard` was told.
        """
        donated = (0,) if donate else ()
        if self.mode == "pmap":
            return jax.pmap(
                step,
                axis_name=AXIS_NAME,
                in_axes=(None, 0, *[None] * constants),
                out_axes=None,
                donate_argnums=donated,
                devices=list(self.mesh.devices.flat),
            )
        replicated = PartitionSpec()
        mapped = jax.shard_map(
            step,
            mesh=self.mesh,
            in_specs=(replicated, _rows(axis), *[replicated] * constants),
            out_specs=replicated,
        )
        return jax.jit(mapped, donate_argnums=donated)


def _rows(axis: int) -> PartitionSpec:
    """The placement of arrays whose rows, along an axis, the devices share."""
    return PartitionSpec(*[None] * axis, AXIS_NAME)


def _split(x: Any, parts: int, axis: int) -> Any:
    """`[..., parts * b, ...]` to `[parts, ..., b, ...]`."""
    x = x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return np.moveaxis(x, axis, 0)


def make_parallel(mode: str = "pmap", devices: Iterable[jax.Device] | None = None) -> Parallel:
    """All devices of all processes, or the given ones, behind one axis.

    Raises:
        UserError (a `ValueError`): an unknown mode, or several processes that have not joined.
    """
    if mode not in MODES:
        raise UserError(f"Unknown parallel mode {mode!r}; choose from {', '.join(MODES)}.")
    if jax.process_count() > 1 and not jax.distributed.is_initialized():  # as a TPU pod may say
        raise UserError(
            f"This host is one of {jax.process_count()} that JAX sees, and they have not joined; "
            "start all of them with --distributed."
        )
    if devices is None:
        # By process first, so that each process has a contiguous part of the global batch.
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Parallel(mode, Mesh(np.array(list(devices)), (AXIS_NAME,)))


def to_global_arrays(like: Any) -> Any:
    """The shapes and dtypes of a state that all devices of all processes have a copy of."""

    def convert(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding
        if jax.process_count() > 1 and sharding.is_fully_addressable:
            sharding = NamedSharding(Mesh(np.array(jax.devices()), (AXIS_NAME,)), PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(convert, like)


def to_local_arrays(state: Any, like: Any) -> Any:
    """The copies of `state` on this process's devices under the shardings of `like`, not moved.

    Turns a state of local arrays into one over the devices of all processes, and back.

    Args:
        state: Arrays that each of their devices has a whole copy of.
        like: Tree of the same structure, whose leaves have a `sharding` of the same kind.
    """

    def convert(x: jax.Array, twin: Any) -> jax.Array:
        if jax.process_count() == 1 or x.sharding == twin.sharding:
            return x
        copies = {shard.device: shard.data for shard in x.addressable_shards}
        ordered = [copies[d] for d in twin.sharding.mesh.devices.flat if d in copies]
        return jax.make_array_from_single_device_arrays(x.shape, twin.sharding, ordered)

    return jax.tree.map(convert, state, like)


class Prefetcher:
    """Iterates over batches that are on the devices before they are asked for.

    Args:
        batches: NumPy batches, this process's rows.
        parallel: The devices.
        depth: Number of batches that are placed ahead.
        axis: The axis of the rows, see `Parallel.shard`.

    Attributes:
        waited: Seconds that the caller has waited for input so far.
    """

    def __init__(
        self, batches: Iterable[Any], parallel: Parallel, depth: int = 2, axis: int = 0
    ) -> None:
        self.waited = 0.0
        self._batches = iter(batches)
        self._shard = partial(parallel.shard, axis=axis)
        self._depth = depth
        self._ready: collections.deque[Any] = collections.deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        while len(self._ready) < self._depth:
            try:
                self._ready.append(self._shard(next(self._batches)))
            except StopIteration:
                break
        self.waited += time.perf_counter() - start
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()
