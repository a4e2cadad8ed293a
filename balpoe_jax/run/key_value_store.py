# SPDX-License-Identifier: Apache-2.0
"""A store of strings and a barrier that the processes of a run share without their devices.

This is the one private import of another library. JAX starts such a store for its own use and has
no public name for it: up to JAX 0.12.0.1, `jax.distributed` offers `initialize`, `is_initialized`
and `shutdown`. The public `jax.experimental.multihost_utils` computes on the devices. They wait for
a process that failed, so it cannot tell the others why. When JAX has a public store, a test of the
imports fails and names this file, which can then go.

The processes must have joined, and every function raises `jax.errors.JaxRuntimeError` where the
store does not answer.
"""

from typing import Any

import jax
from jax._src import distributed


def put(key: str, value: str) -> None:
    """Stores a value under a new key; `jax.errors.JaxRuntimeError` if the key is taken."""
    _client().key_value_set(key, value)


def get(key: str) -> str | None:
    """The value of a key; None if there is none, or the store does not answer."""
    try:
        return str(_client().key_value_try_get(key))
    except jax.errors.JaxRuntimeError:  # one kind for both
        return None


def count(folder: str) -> int:
    """Number of keys that begin with `folder/`."""
    return len(_client().key_value_dir_get(folder))


def wait_for_all(name: str, timeout_seconds: float) -> None:
    """Returns once every process has called this with the same name, which is used once."""
    _client().wait_at_barrier(name, int(1000 * timeout_seconds))


def _client() -> Any:
    return distributed.global_state.client
