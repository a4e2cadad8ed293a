# SPDX-License-Identifier: Apache-2.0
"""A network's variables as safetensors, by their paths: weights without a training's state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from balpoe_jax.errors import UserError
from balpoe_jax.files import reports_write_errors

FILE = "model.safetensors"

_NAMED = 3


def write(folder: Path, variables: Mapping[str, Any]) -> Path:
    """Writes variables and returns the file's path.

    Args:
        folder: Folder of the file.
        variables: The network's `params` and `batch_stats`.

    Raises:
        UserError (a `ValueError`): safetensors is not installed, or the file cannot be written.
    """
    flat = traverse_util.flatten_dict(jax.device_get(dict(variables)), sep="/")
    path = folder / FILE
    save = _safetensors("Writing").save_file
    with reports_write_errors(path):
        save({name: np.ascontiguousarray(value) for name, value in flat.items()}, path)
    return path


def read(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """The variables in a file.

    Args:
        folder: Folder of the file.
        like: Variables, or a tree of `jax.ShapeDtypeStruct`, of the expected shapes.

    Raises:
        UserError (a `ValueError`): safetensors is not installed, a file that cannot be read, or
            names and shapes that are not those of the network.
    """
    path, load = folder / FILE, _safetensors("Reading").load_file
    try:
        flat = load(path)
    except Exception as error:  # safetensors has an error of its own, in a private module
        raise UserError(
            f"The weights {path} cannot be read ({error}); copy the file again."
        ) from error
    expected = traverse_util.flatten_dict(dict(like), sep="/")
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    problems = {
        "missing": sorted(set(shapes) - set(flat)),
        "extra": sorted(set(flat) - set(shapes)),
        "of another shape": sorted(
            name for name in set(flat) & set(shapes) if flat[name].shape != shapes[name]
        ),
    }
    if any(problems.values()):
        told = "; ".join(
            f"{len(names)} {problem}: {', '.join(names[:_NAMED])}"
            for problem, names in problems.items()
            if names
        )
        raise UserError(
            f"The weights {path} are not those of the run's network ({told}); use the config.json "
            "that came with them."
        )
    cast = {name: flat[name].astype(value.dtype) for name, value in expected.items()}
    return traverse_util.unflatten_dict(cast, sep="/")


def _safetensors(what: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UserError(
            f"{what} {FILE} needs the package safetensors, which is not installed; install it "
            "with pip install 'balpoe_jax[export]'."
        ) from error
    return safetensors.numpy
