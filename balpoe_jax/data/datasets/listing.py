# SPDX-License-Identifier: Apache-2.0
"""Image files with their classes: a folder of class folders, or a list of paths and labels.

A listing names files and opens none of them. Three forms are read:

- `FOLDER/CLASS/NAME.jpg`, or `FOLDER/SPLIT/CLASS/NAME.jpg` with the splits train, val and test;
- a CSV file with the header `path,label` or `path,label,split`;
- a file of lines `path label`, as the lists of ImageNet-LT are.
"""

import collections
import csv
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.records.photographs import SUFFIXES
from balpoe_jax.errors import UserError

TRAIN, VALIDATION, TEST = "train", "val", "test"

# Names of the splits in folders and lists; "" where nothing is said.
_SPLITS = {
    "train": TRAIN, "training": TRAIN, "val": VALIDATION, "valid": VALIDATION,
    "validation": VALIDATION, "test": TEST, "": "",
}  # fmt: skip

_NAMED_IN_ERRORS = 3


@dataclasses.dataclass(frozen=True)
class Listing:
    """Image files with their classes and splits.

    Attributes:
        root: Folder of the names.
        names: Paths below the root, with `/` between folders.
        labels: Classes, int64 `[N]`.
        splits: Split of each image, "train", "val" or "test"; "" where nothing is said.
        class_names: Names of the classes.
    """

    root: str
    names: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    splits: tuple[str, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def some(names: Iterable[str], limit: int = _NAMED_IN_ERRORS) -> str:
    """The first few of some names, and how many more there are, for a message."""
    names = list(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_folder(folder: str, class_names: Sequence[str] = ()) -> Listing:
    """Lists a folder of class folders, with folders of splits above them or without.

    Images lie anywhere below the folder of their class; files of other endings and hidden files are
    passed over. The order is that of the names.

    Args:
        folder: The folder.
        class_names: Names of the classes in their order; empty for the folders' names, sorted.

    Raises:
        UserError (a `ValueError`): a folder that is not there or cannot be read, without class
            folders, or with a class without images; a class folder that `class_names` lacks.
    """
    root = Path(folder).expanduser().absolute()
    folders = _subfolders(root)
    splits = [name for name in folders if name.lower() in _SPLITS and _subfolders(root / name)]
    if splits:
        _refuse_others(root, folders, splits)
    parts = splits or [""]
    found: list[tuple[str, str, str]] = []  # split, class, name
    for part in parts:
        for label in _subfolders(root / part):
            names = list(_images(root, os.path.join(part, label)))
            if not names:
                raise UserError(
                    f"The folder {root / part / label} should hold the images of a class and has "
                    f"none that ends in {', '.join(SUFFIXES)}; add some or remove the folder."
                )
            found.extend((_SPLITS[part.lower()], label, name) for name in names)
    if not found:
        raise UserError(
            f"{root} should hold a folder for each class, with its images in it, and has no "
            "folder; move the images into folders that are named after their classes."
        )
    labels, known = _numbered([label for _, label, _ in found], class_names, str(root))
    splits_of = tuple(split for split, _, _ in found)
    return Listing(str(root), tuple(name for _, _, name in found), labels, splits_of, known)


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be read ({error.strerror}); name the folder that holds "
            "the class folders with dir=."
        ) from error


def _refuse_others(root: Path, folders: Sequence[str], splits: Sequence[str]) -> None:
    others = [name for name in folders if name not in splits]
    if others:
        raise UserError(
            f"{root} has folders of splits ({', '.join(splits)}) and others ({some(others)}); "
            "move the others away, or put class folders alone into it."
        )
    doubled = [name for name in splits if _SPLITS[name.lower()] in _of_others(name, splits)]
    if doubled:
        raise UserError(
            f"{root} has several folders for one split ({', '.join(doubled)}); leave one of them."
        )
    if TRAIN not in {_SPLITS[name.lower()] for name in splits}:
        raise UserError(
            f"{root} has the folders {', '.join(splits)} and no train; add the training images."
        )


def _of_others(name: str, splits: Sequence[str]) -> set[str]:
    return {_SPLITS[other.lower()] for other in splits if other != name}


def _images(root: Path, below: str) -> Iterator[str]:
    """Names below `root` of the images below a folder, sorted."""
    for folder, folders, names in os.walk(root / below):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder, name).relative_to(root).as_posix()


def read_lists(
    lists: Mapping[str, str], root: str = "", class_names: Sequence[str] = ()
) -> Listing:
    """Reads lists of paths and labels.

    Labels are names, or whole numbers from 0 when all of them are.

    Args:
        lists: Path of a list by the split of its images; "" where the list says it itself.
        root: Folder of the paths in the lists; empty for the folder of each list.
        class_names: Names of the classes in their order; empty for the labels themselves, sorted.

    Raises:
        UserError (a `ValueError`): a list that cannot be read, a line that has no path and label, a
            split of another name, a path that is listed twice, or a label that `class_names` lacks.
    """
    rows: list[tuple[str, str, str]] = []  # name, label, split
    base = Path(root).expanduser().absolute() if root else None
    for split, path in lists.items():
        folder = base or Path(path).expanduser().absolute().parent
        for name, label, own in _read_list(Path(path).expanduser()):
            if own and split and own != split:
                raise UserError(
                    f"{path} is the list of {split} images and says that {name} is of {own}; take "
                    "the column split out of it, or name the list with list= alone."
                )
            rows.append((os.path.join(folder, name), label, own or split))
    if not rows:
        raise UserError(f"{some(lists.values())} should name images and is empty; add some.")
    top = base or Path(os.path.commonpath([os.path.dirname(name) for name, _, _ in rows]))
    names = tuple(Path(os.path.relpath(name, top)).as_posix() for name, _, _ in rows)
    _refuse_twice(names)
    labels, known = _numbered([label for _, label, _ in rows], class_names, some(lists.values()))
    return Listing(str(top), names, labels, tuple(split for _, _, split in rows), known)


def _read_list(path: Path) -> list[tuple[str, str, str]]:
    """Name, label and split of each line of a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UserError(f"The list {path} cannot be read ({reason}); check its path.") from error
    lines = text.splitlines()
    first = next(iter(lines), "")
    if "," in first and "path" in [cell.strip().lower() for cell in first.split(",")]:
        return list(_csv_rows(path, lines))
    return list(_plain_rows(path, lines))


def _csv_rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    try:
        rows = list(csv.reader(lines))
    except csv.Error as error:
        raise UserError(f"The list {path} is no CSV file ({error}); write it again.") from error
    header = [cell.strip().lower() for cell in rows[0]]
    if not {"path", "label"} <= set(header) or len(set(header)) < len(header):
        raise UserError(
            f"The list {path} should begin with the header path,label or path,label,split, and "
            f"begins with {lines[0][:80]!r}; name the columns so."
        )
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        cells = dict(zip(header, (cell.strip() for cell in row), strict=False))
        name, label = cells.get("path", ""), cells.get("label", "")
        if len(row) != len(header) or not name or not label:
            raise UserError(
                f"Row {number} of {path} should have {len(header)} columns with a path and a "
                f"label, and is {','.join(row)[:80]!r}; correct it."
            )
        yield _checked_name(path, number, name), label, _split(path, number, cells.get("split", ""))


def _plain_rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ") if " " in line.strip() else ("", "", "")
        if "\t" in line:
            name, _, label = line.strip().rpartition("\t")
        if not name.strip() or not label.strip():
            raise UserError(
                f"Line {number} of {path} should be a path and a label with a space between them, "
                f"or the first line the header path,label; it is {line[:80]!r}."
            )
        yield _checked_name(path, number, name.strip()), label.strip(), ""


def _checked_name(path: Path, number: int, name: str) -> str:
    if "\0" in name:
        raise UserError(f"Line {number} of {path} has a path with a zero byte; write it again.")
    return name


def _split(path: Path, number: int, name: str) -> str:
    if name.lower() not in _SPLITS:
        raise UserError(
            f"Row {number} of {path} has the split {name[:40]!r}; it should be train, val or test."
        )
    return _SPLITS[name.lower()]


def _refuse_twice(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = [name for name, times in collections.Counter(names).items() if times > 1]
        raise UserError(
            f"A path should stand in the lists once, and {some(twice)} more often; "
            "remove the others."
        )


def _numbered(
    labels: Sequence[str], class_names: Sequence[str], where: str
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Numbers of the labels, and the names of all classes."""
    found = set(labels)
    no_text = sorted(label for label in found if not _is_text(label))
    if no_text:
        raise UserError(
            f"Names of classes should be text in UTF-8, and {no_text[0]!a} in {where} is not; "
            "rename the folder."
        )
    numeric = all(label.isdecimal() and label.isascii() and len(label) < 7 for label in found)
    if class_names and not found <= set(class_names) and numeric:
        highest = max(map(int, found))
        if highest >= len(class_names):
            raise UserError(
                f"{where} has the label {highest}, and there are {len(class_names)} names of "
                "classes; labels count from 0."
            )
        return np.array([int(label) for label in labels]), tuple(class_names)
    if class_names:
        unknown = sorted(found - set(class_names))
        if unknown:
            raise UserError(
                f"{where} has classes that are not among the names of classes: {some(unknown)}; "
                "add them to the file, or leave classes= out."
            )
        known = tuple(class_names)
    elif numeric:
        known = tuple(sorted(found, key=int))
    else:
        known = tuple(sorted(found))
    position = {name: i for i, name in enumerate(known)}
    return np.array([position[label] for label in labels], np.int64), known


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a folder's name may have any bytes
        return False
    return True


def read_class_names(path: str) -> tuple[str, ...]:
    """The names of classes in a file, one a line, in the order of their numbers.

    Raises:
        UserError (a `ValueError`): a file that cannot be read, an empty one, or a name twice.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UserError(f"The file of classes {path} cannot be read ({reason}).") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(
            f"{path} should name each class once, a line each, and "
            f"{'names ' + some(twice) + ' more often' if twice else 'is empty'}."
        )
    return names
