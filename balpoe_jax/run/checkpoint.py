# SPDX-License-Identifier: Apache-2.0
"""Orbax behind a few verbs: save, restore the latest, wait, close.

A checkpoint is written in the background and appears under its final name only when complete, with
the checksums of its files. Every process takes part. A checkpoint does not depend on the number of
devices and processes: another layout restores it.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from balpoe_jax import parallel
from balpoe_jax.errors import TransientError, UserError, is_transient
from balpoe_jax.run import checksums, multihost
from balpoe_jax.step import TrainState

log = logging.getLogger(__name__)

# The name of a method's state on disk, which the first version chose: older runs can be resumed.
_METHOD_STATE = "extra"
_IN_MEMORY = {_METHOD_STATE: "method_state"}


class Checkpoints:
    """The checkpoints of one run, in one folder, named by step.

    Args:
        directory: Absolute path of the folder, which is created unless it is only read.
        keep: Number of newest checkpoints that are kept.
        read_only: Whether to leave all files as they are, such as those that a training is writing.
    """

    def __init__(self, directory: str, keep: int = 2, read_only: bool = False) -> None:
        self.directory = directory
        self._read_only = read_only
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None if read_only else checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                enable_async_checkpointing=True,
                temporary_path_class=checksums.SummedPath,
            ),
            # Named here, since without its handler Orbax cannot tell what a checkpoint holds.
            item_handlers={"state": ocp.StandardCheckpointHandler()},
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, damaged or not; None without any."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts writing `state` under its step, unless a checkpoint of that step is there.

        The state may be donated to the next step at once: Orbax has fetched it from an accelerator
        before this returns, and a CPU's memory is not overwritten while the writer looks at it.

        Raises:
            TransientError (a `UserError`): this or the save before it could not be written.
            UserError (a `ValueError`): there is a later checkpoint, which is not of this run.
        """
        step = int(jax.device_get(state.step))
        if step == self.latest_step():
            return
        fields = _fields(state)
        everywhere = parallel.to_local_arrays(fields, parallel.to_global_arrays(fields))
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(everywhere))
        try:
            begun = self._manager.save(step, args=arguments)
        except Exception as error:  # of this save, or of the one before that ran until now
            _raise_if_of_jax(error)
            raise self._unwritable(error) from error
        if not begun:
            raise UserError(
                f"Step {step} is not saved, since {self.directory} holds the later checkpoint "
                f"{self.latest_step()}; move away what is not of this run."
            )

    def restore_latest(self, like: TrainState) -> TrainState | None:
        """The newest intact checkpoint, in the shapes, dtypes and placement of `like`.

        It waits for a checkpoint that this object is still writing. Newer ones that are damaged
        move to `damaged-STEP`, unless the folder is only read; nothing is deleted.

        Args:
            like: State, or a tree of `jax.ShapeDtypeStruct` with shardings.

        Returns:
            The restored state, or None when there is no checkpoint.

        Raises:
            UserError (a `ValueError`): a checkpoint of another shape, one that cannot be read, or
                only damaged ones.
            TransientError (a `UserError`): storage that does not answer, does not show all
                processes the same checkpoint, or to which one could not be written.
        """
        self.wait()
        found = multihost.broadcast_text(self._newest_intact)
        multihost.check_same(
            self._steps()[:1],
            "newest checkpoint",
            "start again, and fix the storage if it stays so",
            TransientError,
        )
        if not found:
            return None
        step = int(found)
        self._manager.reload()  # it may know a checkpoint that has just moved away
        where = f"{self.directory}/{step}"
        fields = _fields(like)
        abstract = parallel.to_global_arrays(fields)
        try:
            saved = self._manager.item_metadata(step)["state"]
        except Exception as error:  # Orbax raises what its storage layers do
            _raise_if_of_jax(error)
            raise _unreadable(where, error) from error
        if saved is None:
            raise _unreadable(where, ValueError("it holds no state"))
        former = _former_teacher(saved, abstract)
        abstract = {**abstract, **former}
        _check_shapes(where, saved, abstract)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )
        except Exception as error:
            _raise_if_of_jax(error)
            raise _unreadable(where, error) from error
        kept = {name: value for name, value in restored["state"].items() if name not in former}
        local = parallel.to_local_arrays(kept, fields)
        return like.replace(**{_IN_MEMORY.get(name, name): value for name, value in local.items()})

    def _steps(self) -> list[int]:
        """The steps of all complete checkpoints, newest first."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(self.directory, error) from error
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))[::-1]

    def _newest_intact(self) -> str:
        """The step of the newest intact checkpoint, or nothing; moves newer damaged ones away."""
        damaged: dict[int, str] = {}
        for step in self._steps():
            folder = Path(self.directory, str(step))
            try:
                reason = checksums.damage(folder)
            except OSError as error:
                raise _unreadable(str(folder), error) from error
            if reason is None:
                self._set_aside(damaged, step)
                return str(step)
            damaged[step] = reason
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise UserError(
                f"No checkpoint in {self.directory} is intact ({reasons[:300]}); put a copy of an "
                "intact one there, or start again in another workdir."
            )
        return ""

    def _set_aside(self, damaged: dict[int, str], intact: int) -> None:
        for step, reason in damaged.items():
            log.warning("The checkpoint of step %d is damaged: %s", step, reason)
            if self._read_only:
                log.warning("Taking the checkpoint of step %d instead", intact)
                continue
            number, name = 1, f"damaged-{step}"
            while (there := Path(self.directory, name)).exists():
                number, name = number + 1, f"damaged-{step}-{number + 1}"
            try:
                Path(self.directory, str(step)).rename(there)
            except OSError as error:
                raise self._unwritable(error) from error
            log.warning("It is now %s; going back to the checkpoint of step %d", name, intact)

    def close(self) -> None:
        """Waits for writing to end."""
        self.wait()
        self._manager.close()

    def wait(self) -> None:
        """Waits for writing to end; raises TransientError (a `UserError`) when it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            _raise_if_of_jax(error)
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> TransientError:
        return TransientError(
            f"A checkpoint could not be written to {self.directory} ({_reason(error)}); make room "
            "or fix its permissions, and start again to go on from the checkpoint before it."
        )


def _raise_if_of_jax(error: Exception) -> None:
    """Raises an error of JAX again: not storage, but another process or memory is its cause."""
    if multihost.is_of_jax(error):
        raise error


def _unreadable(where: str, error: Exception) -> UserError:
    code = re.search(r"os_error_code='(\d+)'", str(error))  # as TensorStore words it
    refusal = OSError(int(code[1]), "") if code else error
    if isinstance(refusal, OSError) and is_transient(refusal):
        return TransientError(
            f"The checkpoint {where} cannot be read ({_reason(error)}); start again when its "
            "storage answers."
        )
    return UserError(
        f"The checkpoint {where} cannot be read ({_reason(error)}); move that folder away "
        "to go on from the checkpoint before it."
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _fields(state: TrainState) -> dict[str, Any]:
    """The fields of a state by their names on disk, without a method's state that is empty."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    kept = fields.pop("method_state")
    if fields["averages"] is None:
        del fields["averages"]
    return fields | ({_METHOD_STATE: kept} if jax.tree.leaves(kept) else {})


def _former_teacher(saved: Any, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher in a student's checkpoint of an older version, which is read and dropped."""
    there = saved.get(_METHOD_STATE)
    if _METHOD_STATE in expected or not isinstance(there, Mapping) or set(there) != {"teacher"}:
        return {}
    placement = jax.tree.leaves(expected)[0].sharding
    return {
        _METHOD_STATE: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), there
        )
    }


def _check_shapes(where: str, saved: Any, expected: Any) -> None:
    """Raises UserError with all leaves that differ, where Orbax would stop at the first."""
    there, here = _shapes(saved), _shapes(expected)
    differing = [
        f"{name} {there.get(name, 'absent')} instead of {here.get(name, 'absent')}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"The checkpoint {where} is of another model or optimizer: "
            f"{', '.join(differing[:4])}{more}; use the config that it was trained with."
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every array by its path, whether containers use names or positions."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {"/".join(_key_name(key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def _key_name(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
