# SPDX-License-Identifier: Apache-2.0
"""Checksums of a checkpoint's files, in a file beside them that `sha256sum -c` can read, too."""

import asyncio
import hashlib
import os
from pathlib import Path

from etils import epath

# Without a public name, though Orbax has an option that takes a class of this kind.
from orbax.checkpoint._src.path import atomicity

SUMS = "SHA256SUMS"


class SummedPath(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder of a checkpoint, which gets its checksums before its final name.

    So there is no moment at which a complete checkpoint has none.
    """

    async def finalize(self) -> None:
        """Gives the folder its final name; of a checkpoint, after its checksums."""
        final: epath.Path = self._final_path  # type: ignore[has-type]
        if not final.name.isdecimal():  # a part of a checkpoint
            await super().finalize()
            return
        # Orbax finishes what it writes, and takes the folder to a name that is not the final one.
        summing = final.with_name(f"{final.name}.summing{atomicity.TMP_DIR_SUFFIX}")
        self._final_path = summing
        try:
            await super().finalize()
        finally:
            self._final_path = final
        await asyncio.to_thread(write_sums, Path(summing))
        await asyncio.to_thread(os.rename, summing, final)


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
    """What is wrong with a folder's files; None when they are as they were written.

    Files that came later are no damage.

    Raises:
        OSError: storage that does not answer, or does not let us read.
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
    """The lines and a last one, by which a file that was cut short is noticed."""
    text = "".join(f"{line}\n" for line in lines)
    return f"{text}# {len(lines)} files {hashlib.sha256(text.encode()).hexdigest()}\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
