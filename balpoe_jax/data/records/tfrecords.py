# SPDX-License-Identifier: Apache-2.0
"""The places of images inside TFRecord files, so that any image can be read by itself.

A record is a length, a checksum, a serialised `tf.train.Example` and another checksum. A scan walks
the protocol buffer from field to field and reads only the few bytes around each image. It verifies
the checksums of the lengths; reading an image verifies the checksum of its record. Needs no
TensorFlow.
"""

import functools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from balpoe_jax.data import extras
from balpoe_jax.data.records import index_cache
from balpoe_jax.errors import UserError

_HEADER, _FOOTER = 12, 4


class RecordIndex(NamedTuple):
    """The images of a split, in the order of its files.

    Attributes:
        files: Position of each image's file among the files, int32 `[N]`.
        offsets: First byte of the image in that file, int64 `[N]`.
        sizes: Length of the image in bytes, int64 `[N]`.
        labels: Classes, int64 `[N]`.
        names: Identifiers stored with the images, str `[N]`.
        starts, lengths: First byte and length of the record's content, int64 `[N]`.
    """

    files: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    names: npt.NDArray[np.str_]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def select(self, indices: npt.NDArray[np.int64]) -> "RecordIndex":
        """The entries at `indices`, in that order."""
        columns: Iterator[Any] = (column[indices] for column in self)
        return RecordIndex(*columns)


class DamagedRecord(Exception):  # noqa: N818
    """A record that is not what was written."""


def read_image(descriptor: int, index: RecordIndex, i: int) -> bytes:
    """The image at position `i` of an index, from the open file of this descriptor.

    Raises:
        DamagedRecord: a record that is cut off, or whose checksum is wrong.
        OSError: a failure of the storage.
    """
    start, length = int(index.starts[i]), int(index.lengths[i])
    record = os.pread(descriptor, length + _FOOTER, start)
    if len(record) != length + _FOOTER:
        raise DamagedRecord("the file ends within its record")
    content = record[:length]
    if _masked_crc(content) != int.from_bytes(record[length:], "little"):
        raise DamagedRecord("the checksum of its record is wrong")
    offset = int(index.offsets[i]) - start
    return content[offset : offset + int(index.sizes[i])]


def record_number(path: str, start: int) -> int:
    """The number from 0 of the record whose content begins at byte `start`; -1 if there is none."""
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            starts = (found for found, _ in _records(buffer))
            return next((n for n, found in enumerate(starts) if found == start), -1)
        except EOFError:
            return -1
        finally:
            buffer.close()


def load_index(paths: Sequence[str], name_feature: str) -> RecordIndex:
    """The index of files, from the user's cache if it was made before; see `index_cache`.

    Args:
        paths: TFRecord files of examples with the features `image` (bytes), `label` (an integer)
            and `name_feature`.
        name_feature: Feature with the text that identifies an example.

    Raises:
        UserError (a `ValueError`): a file that cannot be read, or holds something else.
    """
    return index_cache.load(RecordIndex, paths, name_feature, scan)


def scan(paths: Sequence[str], name_feature: str) -> RecordIndex:
    """Makes the index; arguments and errors as for `load_index`."""
    rows = [
        (number, *entry)
        for number, path in enumerate(paths)
        for entry in _scan_file(path, name_feature)
    ]
    columns: list[Any] = list(zip(*rows, strict=True)) or [()] * 7
    return RecordIndex(
        np.array(columns[0], np.int32),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.int64),
        np.array(columns[3], np.int64),
        np.array(columns[4], np.str_),
        np.array(columns[5], np.int64),
        np.array(columns[6], np.int64),
    )


def _scan_file(path: str, name_feature: str) -> Iterator[tuple[int, int, int, str, int, int]]:
    """Offset, size, label and name of each image of a file; start and length of its record."""
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                for number, (start, stop) in enumerate(_records(buffer)):
                    try:
                        example = read_example(buffer, start, stop, name_feature)
                    except (ValueError, IndexError, KeyError, StopIteration) as error:
                        raise UserError(
                            f"Record {number} of {path} is not an example with an image, a label "
                            f"and {name_feature!r}{_emptiness(start, stop)}; prepare the data set "
                            "again."
                        ) from error
                    yield *example, start, stop - start
    except OSError as error:
        raise UserError(
            f"The records {path} cannot be read ({error.strerror}); they must lie on a local or "
            "mounted file system."
        ) from error
    except EOFError as error:
        raise UserError(
            f"{path} is cut off or damaged at {error}; prepare the data set again."
        ) from error


def _emptiness(start: int, stop: int) -> str:
    return " (it has no content)" if start == stop else ""


def _records(buffer: mmap.mmap) -> Iterator[tuple[int, int]]:
    """First byte and end of the content of each record; EOFError names one that is damaged."""
    position, end, number = 0, len(buffer), 0
    while position < end:
        start = position + _HEADER
        length, crc = buffer[position : position + 8], buffer[position + 8 : start]
        stop = start + int.from_bytes(length, "little")
        position = stop + _FOOTER
        if position > end or _masked_crc(length) != int.from_bytes(crc, "little"):
            raise EOFError(f"record {number}")
        yield start, stop
        number += 1


def _masked_crc(content: bytes) -> int:
    """The checksum that a TFRecord file stores of some bytes."""
    crc = _crc32c()(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _crc32c() -> Callable[[bytes], int]:
    """The checksum function, imported on first use."""
    try:
        from google_crc32c import value
    except ImportError as error:
        raise UserError(
            f"Reading TFRecord files needs google-crc32c, which is not installed; {extras.INSTALL}."
        ) from error
    return value


def read_example(
    buffer: mmap.mmap | bytes, start: int, stop: int, name_feature: str
) -> tuple[int, int, int, str]:
    """First byte and size of the image of a serialised example, its label and its name.

    Args:
        buffer: Bytes that hold the example.
        start, stop: Range of the example's bytes.
        name_feature: Feature that holds the name; empty for none, which leaves the name empty.

    Raises:
        ValueError, IndexError, KeyError, StopIteration: bytes that are no such example.
    """
    found: dict[bytes, tuple[int, int]] = {}
    wanted = {b"image", b"label", name_feature.encode()}
    for _, features_start, features_stop in _fields(buffer, start, stop):
        for _, entry_start, entry_stop in _fields(buffer, features_start, features_stop):
            entry = {n: (a, b) for n, a, b in _fields(buffer, entry_start, entry_stop)}
            key = buffer[slice(*entry[1])]
            if key in wanted:
                # Feature -> list of values -> the first value, as each of ours has one.
                _, list_start, list_stop = next(_fields(buffer, *entry[2]))
                _, start_of_value, stop_of_value = next(_fields(buffer, list_start, list_stop))
                found[key] = start_of_value, stop_of_value
    image_start, image_stop = found[b"image"]
    label, _ = _varint(buffer, found[b"label"][0])
    name = buffer[slice(*found[name_feature.encode()])].decode() if name_feature else ""
    return image_start, image_stop - image_start, _signed(label), name


def _fields(buffer: mmap.mmap | bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and end of each field of a message.

    A field that is a number has no length: its end is the end of the number's bytes.
    """
    while start < stop:
        tag, start = _varint(buffer, start)
        if tag & 7 == 2:  # length-delimited
            length, start = _varint(buffer, start)
            end = start + length
        elif tag & 7 == 0:
            _, end = _varint(buffer, start)
        else:
            raise ValueError
        if end > stop:
            raise ValueError
        yield tag >> 3, start, end
        start = end


def _varint(buffer: mmap.mmap | bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
