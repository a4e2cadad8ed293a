# SPDX-License-Identifier: Apache-2.0
"""The examples inside ArrayRecord files, which allow random access to their records.

A scan reads every record once for its label and its name. Later, the library's reader reads any
record by its number, and verifies its hash. Needs no TensorFlow.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from balpoe_jax.data import extras
from balpoe_jax.data.records import index_cache, tfrecords
from balpoe_jax.data.records.tfrecords import DamagedRecord
from balpoe_jax.errors import UserError

# Options for random access: nothing is read ahead.
_OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 2**15}
_RECORDS_A_SCAN = 64


class ArrayRecordIndex(NamedTuple):
    """The images of a split, in the order of its files.

    Attributes:
        files: Position of each image's file among the files, int32 `[N]`.
        positions: Number of its record in that file, int64 `[N]`.
        labels: Classes, int64 `[N]`.
        names: Identifiers stored with the images, str `[N]`.
    """

    files: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    names: npt.NDArray[np.str_]

    def select(self, indices: npt.NDArray[np.int64]) -> "ArrayRecordIndex":
        """The entries at `indices`, in that order."""
        columns: Iterator[Any] = (column[indices] for column in self)
        return ArrayRecordIndex(*columns)


def open_reader(path: str) -> Any:
    """The library's reader of a file; threads may share it.

    Raises:
        UserError (a `ValueError`): the library is not installed.
        OSError: a failure of the storage.
        DamagedRecord: no ArrayRecord file, or one whose end is damaged.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise UserError(
            f"Reading ArrayRecord files needs array_record, which is not installed; "
            f"{extras.INSTALL}."
        ) from error
    try:
        reader = ArrayRecordReader(path, **_OPTIONS)
        if not reader.ok():
            raise RuntimeError("it cannot be opened")
        return reader
    except RuntimeError as error:
        raise _reason(path, error) from error


def read_image(reader: Any, path: str, index: ArrayRecordIndex, i: int) -> bytes:
    """The image at position `i` of an index.

    Args:
        reader: Reader of the image's file.
        path: Path of that file.
        index: Index of the split.
        i: Position in the index.

    Raises:
        DamagedRecord: a record that is not what was written.
        OSError: a failure of the storage.
    """
    try:
        (record,) = reader.read([int(index.positions[i])])
        start, size, _, _ = tfrecords.read_example(record, 0, len(record), "")
    except RuntimeError as error:
        raise _reason(path, error) from error
    return record[start : start + size]


def load_index(paths: Sequence[str], name_feature: str, lengths: Sequence[int]) -> ArrayRecordIndex:
    """The index of files, from the user's cache if it was made before; see `index_cache`.

    Args:
        paths: ArrayRecord files of examples with the features `image` (bytes), `label` (an
            integer) and `name_feature`.
        name_feature: Feature with the text that identifies an example.
        lengths: Number of records of each file, which the library does not know of a damaged one.

    Raises:
        UserError (a `ValueError`): a file that cannot be read, or holds something else.
    """
    index = index_cache.load(ArrayRecordIndex, paths, name_feature, scan)
    found = np.bincount(index.files, minlength=len(paths))
    for path, length, expected in zip(paths, found, lengths, strict=True):
        if length != expected:
            raise UserError(
                f"{path} should hold {expected} records, and {length} can be read; prepare the "
                "data set again."
            )
    return index


def scan(paths: Sequence[str], name_feature: str) -> ArrayRecordIndex:
    """Makes the index; arguments and errors as for `load_index`."""
    rows = [
        (number, *entry)
        for number, path in enumerate(paths)
        for entry in _scan_file(path, name_feature)
    ]
    columns: list[Any] = list(zip(*rows, strict=True)) or [()] * 4
    return ArrayRecordIndex(
        np.array(columns[0], np.int32),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.int64),
        np.array(columns[3], np.str_),
    )


def _scan_file(path: str, name_feature: str) -> Iterator[tuple[int, int, str]]:
    """Position, label and name of each image of a file."""
    position = 0
    try:
        for position, record in records(path):
            _, _, label, name = tfrecords.read_example(record, 0, len(record), name_feature)
            yield position, label, name
    except OSError as error:
        raise UserError(
            f"The records {path} cannot be read ({error.strerror}); they must lie on a local or "
            "mounted file system."
        ) from error
    except DamagedRecord as error:
        raise UserError(
            f"{path} is cut off or damaged ({error}); prepare the data set again."
        ) from error
    except (ValueError, IndexError, KeyError, StopIteration) as error:
        raise UserError(
            f"Record {position} of {path} is not an example with an image, a label and "
            f"{name_feature!r}; prepare the data set again."
        ) from error


def records(path: str) -> Iterator[tuple[int, bytes]]:
    """Number and content of every record of a file, in order.

    Raises:
        DamagedRecord: a record that is not what was written.
        OSError: a failure of the storage.
    """
    reader = open_reader(path)
    try:
        count = reader.num_records()
        for first in range(0, count, _RECORDS_A_SCAN):
            numbers = range(first, min(first + _RECORDS_A_SCAN, count))
            yield from zip(numbers, reader.read(list(numbers)), strict=True)
    except RuntimeError as error:
        raise _reason(path, error) from error
    finally:
        reader.close()


def _reason(path: str, error: RuntimeError) -> Exception:
    """The cause of an error of the library, which raises one kind for all: storage or damage."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as refusal:
        return refusal
    return DamagedRecord(" ".join(str(error).split())[:200].rstrip("."))
