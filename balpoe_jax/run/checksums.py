# SPDX-License-Identifier: Apache-2.0
"""Checksums of a checkpoint's files, in a file next to them that `sha256sum -c` also reads."""

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

from etils import epath
from orbax.checkpoint.path import atomicity

SUMS = "SHA256SUMS"


class SummedPath(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder of a checkpoint, which gets its checksums before its final name.

    So there is no moment at which a complete checkpoint has none. Orbax's hooks, such as
    `AsyncOptions.post_finalization_callback`, come before it writes its last files or after the
    final name.

    Args:
        temporary_path: Folder that Orbax writes to.
        final_path: Folder of the checkpoint, named by its step, or a part of one.
        options: Further options, as Orbax gives them.
    """

    def __init__(
        self, temporary_path: epath.Path | None, final_path: epath.Path, **options: Any
    ) -> None:
        self._ours = final_path
        # Whether it is a checkpoint, not a part of one. Orbax then stops one name short of the end.
        self._is_summed = final_path.name.isdecimal()
        self._theirs = (
            final_path.with_name(f"{final_path.name}.summing{atomicity.TMP_DIR_SUFFIX}")
            if self._is_summed
            else final_path
        )
        super().__init__(temporary_path, self._theirs, **options)

    def get_final(self) -> epath.Path:
        """The folder's final name."""
        return self._ours

    async def finalize(self) -> None:
        """Gives the folder its final name; of a checkpoint, after its checksums."""
        await super().finalize()
        if self._is_summed:
            await asyncio.to_thread(write_sums, Path(self._theirs))
            await asyncio.to_thread(os.rename, self._theirs, self._ours)


def write_sums(folder: Path) -> None:
    """Writes the checksums of all files that a folder holds."""
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path != folder / SUMS
    )
    with (folder / SUMS).open("w", encoding="utf-8") as file:
        file.write(_listing(folder, names))
        file.flush()
        os.fsync(file.fileno())


def damage(folder: Path) -> str | None:
    """What is wrong with a folder's files; None if they are as they were written.

    Files that were added later are no damage.

    Raises:
        OSError: storage that does not answer, or that refuses to be read.
    """
    try:
        written = (folder / SUMS).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {SUMS}"
    lines = written.decode(errors="replace").split("\n")[:-2]
    names = [line[66:] for line in lines]  # after 64 digits and two spaces
    for name, line in zip(names, lines, strict=True):
        try:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                return f"its {SUMS} is damaged"
            if line != f"{_digest(folder / name)}  {name}":
                return f"{name} is not what was written"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
            return f"{name!r} is missing"
    return None if written == _ended(lines).encode() else f"its {SUMS} is damaged"


def _listing(folder: Path, names: list[str]) -> str:
    return _ended([f"{_digest(folder / name)}  {name}" for name in names])


def _ended(lines: list[str]) -> str:
    """The lines, and a last one that reveals a file which was cut short."""
    text = "".join(f"{line}\n" for line in lines)
    return f"{text}# {len(lines)} files {hashlib.sha256(text.encode()).hexdigest()}\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
