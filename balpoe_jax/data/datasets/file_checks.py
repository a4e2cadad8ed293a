# SPDX-License-Identifier: Apache-2.0
"""What image files are, found before training: sizes of images, and digests of the files.

Files are read once, several at a time. What was found is kept in the user's cache, by path, size
and time of change, so that the next start opens new files only.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from balpoe_jax.data import cache
from balpoe_jax.data.datasets.listing import some
from balpoe_jax.data.records import photographs
from balpoe_jax.errors import TransientError, UserError, is_transient
from balpoe_jax.progress_bar import ProgressBar

log = logging.getLogger(__name__)

# Part of an entry's name: raise it when what is kept changes.
_VERSION = 1


class FileFacts(NamedTuple):
    """What is known of each file; also the columns of the cache.

    Attributes:
        names: Paths below the folder, str `[N]`.
        bytes: Sizes of the files, int64 `[N]`.
        changed: Times of change in nanoseconds, int64 `[N]`.
        heights, widths: Sizes in pixels of the upright images, int32 `[N]`.
        digests: SHA-256 of the files' contents in hexadecimal digits, its first 32, str `[N]`.
    """

    names: npt.NDArray[np.str_]
    bytes: npt.NDArray[np.int64]
    changed: npt.NDArray[np.int64]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    digests: npt.NDArray[np.str_]

    @property
    def one_size(self) -> tuple[int, int] | None:
        """Height and width that all images have; None where they differ."""
        sizes = {*zip(self.heights.tolist(), self.widths.tolist(), strict=True)}
        return sizes.pop() if len(sizes) == 1 else None


def examine(root: str, names: Sequence[str], where: str, threads: int | None = None) -> FileFacts:
    """Opens the files that are new or changed, and says what all are.

    Args:
        root: Folder of the names.
        names: Paths below it.
        where: Where the names come from, for messages: the folder or the list.
        threads: Number of files that are read at once; None for four times the cores.

    Raises:
        UserError (a `ValueError`): names without a file, or files that are no images; a
            `TransientError` where storage fails.
    """
    stats = _stat_all(root, names, where)
    kept = _Cache(root)
    known = kept.read()
    new = [i for i, name in enumerate(names) if known.get(name, (None,))[:2] != stats[i]]
    found, bad = _read_all(root, [names[i] for i in new], threads)
    for i, content in zip(new, found, strict=True):
        if names[i] not in bad:
            known[names[i]] = (*stats[i], *content)
    if new:
        # With what was known of other lists on this folder, and before a bad file ends the start.
        kept.write(_facts(known, list(known)))
    if bad:
        reasons = (f"{name} ({reason})" for name, reason in bad.items())
        raise UserError(
            f"{len(bad):,} of the {len(names):,} images of {where} cannot be read: "
            f"{some(reasons)}; replace or remove them."
        )
    return _facts(known, names)


def _facts(known: Mapping[str, tuple], names: Sequence[str]) -> FileFacts:
    dtypes = (np.int64, np.int64, np.int32, np.int32, np.str_)
    columns = (
        np.array([known[name][column] for name in names], dtype)
        for column, dtype in enumerate(dtypes)
    )
    return FileFacts(np.array(names, np.str_), *columns)


def _stat_all(root: str, names: Sequence[str], where: str) -> list[tuple[int, int]]:
    stats, missing = [], []
    for name in names:
        try:
            status = os.stat(os.path.join(root, name))
        except OSError as error:
            if is_transient(error):
                raise _storage_failed(root, name, error) from error
            missing.append(name)
        else:
            stats.append((status.st_size, status.st_mtime_ns))
    if missing:
        raise UserError(
            f"{len(missing):,} of the {len(names):,} images of {where} are not below {root}: "
            f"{some(missing)}; name the folder of the paths with dir=."
        )
    return stats


def _storage_failed(root: str, name: str, error: OSError) -> TransientError:
    return TransientError(
        f"The image {os.path.join(root, name)} cannot be read ({error.strerror or error}); start "
        "again when the storage answers."
    )


def _read_all(
    root: str, names: Sequence[str], threads: int | None
) -> tuple[list[tuple[int, int, str]], dict[str, str]]:
    """Height, width and digest of each file, and the reasons of those that are no images."""
    bad: dict[str, str] = {}

    def read(name: str) -> tuple[int, int, str]:
        try:
            with open(os.path.join(root, name), "rb") as file:
                content = file.read()
            header = photographs.read_header(content)
        except photographs.BadFile as error:
            bad[name] = str(error)
        except OSError as error:
            if is_transient(error):
                raise _storage_failed(root, name, error) from error
            bad[name] = error.strerror or str(error)
        else:
            return header.height, header.width, hashlib.sha256(content).hexdigest()[:32]
        return 0, 0, ""

    workers = threads or 4 * (os.cpu_count() or 1)
    found = []
    with ProgressBar(log, "Checked", len(names)) as bar, ThreadPoolExecutor(workers) as pool:
        for facts in pool.map(read, names):
            found.append(facts)
            bar.add(1)
    return found, {name: bad[name] for name in names if name in bad}


class _Cache:
    """The facts of a folder's files in the user's cache; a damaged entry counts as none."""

    def __init__(self, root: str) -> None:
        digest = hashlib.sha256(os.fsencode(f"{_VERSION}\n{root}")).hexdigest()[:32]
        self._path = cache.folder() / f"files-{digest}.npz"

    def read(self) -> dict[str, tuple]:
        """Facts by name."""
        try:
            with open(self._path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                columns = [stored[field] for field in FileFacts._fields]
        except Exception:  # NumPy, its archive and its compression each raise their own
            return {}
        if len({column.shape for column in columns}) != 1 or columns[0].ndim != 1:
            return {}
        names, *others = (column.tolist() for column in columns)
        return dict(zip(names, zip(*others, strict=True), strict=True))

    def write(self, facts: FileFacts) -> None:
        """Keeps facts in place of what is there; if that fails, files are opened again."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                np.savez_compressed(file, **facts._asdict())
            os.replace(file.name, self._path)
        except OSError as error:
            log.info("What files are could not be kept in %s (%s)", self._path, error.strerror)


def copies(
    facts: FileFacts, positions: npt.NDArray[np.int64], of: npt.NDArray[np.int64]
) -> dict[int, int]:
    """Positions of images whose content is that of an image at the positions `of`, by position.

    Args:
        facts: Facts of all files.
        positions: Images that may be copies, int64.
        of: Images that they may be copies of, int64.
    """
    first = {str(facts.digests[i]): int(i) for i in reversed(of)}
    return {
        int(i): first[str(facts.digests[i])] for i in positions if str(facts.digests[i]) in first
    }
