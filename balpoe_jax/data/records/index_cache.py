# SPDX-License-Identifier: Apache-2.0
"""Indices of record files in the user's cache, so that files are scanned once.

The cache is `$XDG_CACHE_HOME/balpoe_jax` (`~/.cache` by default). An entry is named after the
paths, sizes and modification times of the files, so that changed files are scanned again.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from balpoe_jax.data import cache
from balpoe_jax.errors import UserError

log = logging.getLogger(__name__)

# Part of the fingerprint: raise it when what an index holds changes.
_VERSION = 2

Index = TypeVar("Index", bound=tuple[Any, ...])


def load(
    kind: type[Index],
    paths: Sequence[str],
    name_feature: str,
    scan: Callable[[Sequence[str], str], Index],
) -> Index:
    """The index of files, from the cache if it was made before.

    Args:
        kind: Named tuple of NumPy arrays of one length.
        paths: Files of the index.
        name_feature: Feature that identifies an example.
        scan: Function that makes the index of `paths` and `name_feature`.

    Raises:
        UserError (a `ValueError`): a file that cannot be read, or an error of `scan`.
    """
    cached = cache.folder() / f"records-{_fingerprint(paths, name_feature)}.npz"
    index = _read(kind, cached)
    if index is None:
        index = scan(paths, name_feature)
        _write(cached, index)
    return index


def _fingerprint(paths: Sequence[str], name_feature: str) -> str:
    described = [str(_VERSION), name_feature]
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(
                f"The records {path} cannot be read ({error.strerror}); they must lie on a local "
                "or mounted file system."
            ) from error
        described += [os.path.abspath(path), str(status.st_size), str(status.st_mtime_ns)]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:32]


def _read(kind: type[Index], path: Path) -> Index | None:
    fields: Sequence[str] = kind._fields  # type: ignore[attr-defined]
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            index = kind(*(stored[field] for field in fields))
    except Exception:  # NumPy, its archive and its compression each raise their own
        return None
    return index if len({column.shape for column in index}) == 1 else None


def _write(path: Path, index: Any) -> None:
    """Writes an index; if that fails, the next start scans again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # With a name of its own: other hosts may share the folder.
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.savez_compressed(file, **index._asdict())
        os.replace(file.name, path)
    except OSError as error:
        log.info("The index of records could not be kept in %s (%s)", path.parent, error.strerror)
