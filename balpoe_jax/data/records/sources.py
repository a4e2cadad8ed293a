# SPDX-License-Identifier: Apache-2.0
"""Random access to the examples of a split.

A source has `labels` int64 `[N]`. `encoded` says whether its images have to be decoded, and
`image_shape` is their shape in a batch. `balpoe_jax.data.records.readers` reads a source inside a
tf.data graph; nothing here needs TensorFlow.
"""

import abc
import dataclasses
import os
import resource
import threading
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.records import array_records, photographs, tfrecords
from balpoe_jax.data.records.array_records import ArrayRecordIndex
from balpoe_jax.data.records.tfrecords import RecordIndex
from balpoe_jax.errors import UserError

# What reading an image raises where the image itself is at fault.
UNREADABLE = (tfrecords.DamagedRecord, photographs.BadFile)


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Decoded images of one size, in memory.

    Attributes:
        images: Pixels, uint8 `[N, H, W, 3]`.
        labels: Classes, int64 `[N]`.
        keys: Positions in the original data set, int64 `[N]`.
    """

    encoded: ClassVar[bool] = False
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.labels) == len(self.keys) or not len(self.labels):
            raise UserError(
                "A source needs as many images as labels and keys, at least one, "
                f"got {len(self.images)}, {len(self.labels)} and {len(self.keys)}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, 3)`."""
        return self.images.shape[1:]

    def select(self, indices: npt.NDArray[np.int64]) -> "ArraySource":
        """The examples at `indices`, in that order."""
        return ArraySource(self.images[indices], self.labels[indices], self.keys[indices])

    def ids(self, indices: npt.NDArray[np.integer]) -> list[str]:
        """The names of the examples at `indices`: their positions in the original data set."""
        return [str(key) for key in self.keys[indices]]


class FileIndex(NamedTuple):
    """Image files of a folder.

    Attributes:
        names: Paths below the folder, str `[N]`.
        labels: Classes, int64 `[N]`.
    """

    names: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int64]

    def select(self, indices: npt.NDArray[np.int64]) -> "FileIndex":
        """The files at `indices`, in that order."""
        return FileIndex(self.names[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class StoredSource(abc.ABC):
    """Images that are read from files, one by one.

    Attributes:
        index: Places of the images, with their names and labels.
        image_size: Height and width in pixels of the images in a batch.
        resize: Length in pixels of a test image's short side before the central crop.
        encoded: Whether a batch is read as files, which the pipeline decodes, or as pixels.
    """

    encoded: ClassVar[bool] = True
    index: RecordIndex | ArrayRecordIndex | FileIndex
    image_size: int
    resize: int

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= self.resize:
            raise UserError(
                "Expected an image size of at least 1 pixel and a resized short side of at least "
                f"that, got {self.image_size} and {self.resize}."
            )

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 `[N]`."""
        return self.index.labels

    @property
    def names(self) -> npt.NDArray[np.str_]:
        """Names of the examples, str `[N]`."""
        return self.index.names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, 3)` in a batch."""
        return self.image_size, self.image_size, 3

    @abc.abstractmethod
    def read_image(self, i: int) -> bytes:
        """The file of the image at position `i`; raises one of `UNREADABLE` or `OSError`."""

    @abc.abstractmethod
    def file(self, i: int) -> str:
        """The file in which the image at position `i` lies."""

    @abc.abstractmethod
    def where(self, i: int) -> str:
        """The place of the image at position `i`, in words."""

    def remedy(self) -> str:
        """What to do about an image that cannot be read."""
        return "replace it and prepare the data set again"

    def make_room(self) -> None:  # noqa: B027 - most need nothing
        """Prepares this process for reading; nothing by default.

        Raises:
            UserError (a `ValueError`): the system allows too few open files.
        """

    def select(self, indices: npt.NDArray[np.int64]) -> Self:
        """The examples at `indices`, in that order."""
        return dataclasses.replace(self, index=self.index.select(indices))

    def __len__(self) -> int:
        return len(self.labels)

    def ids(self, indices: npt.NDArray[np.integer]) -> list[str]:
        """The names of the examples at `indices`."""
        return [str(name) for name in self.names[indices]]


@dataclasses.dataclass(frozen=True)
class RecordSource(StoredSource):
    """Encoded photographs in TFRecord or ArrayRecord files, read one by one.

    Attributes:
        paths: Files of the split.
    """

    index: RecordIndex | ArrayRecordIndex
    _: dataclasses.KW_ONLY
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.index.labels):
            raise UserError(f"There is no example in {', '.join(self.paths) or 'no file'}.")
        super().__post_init__()

    def read_image(self, i: int) -> bytes:
        """The encoded image at position `i`; raises `DamagedRecord` or `OSError`."""
        path, index = self.file(i), self.index
        if isinstance(index, ArrayRecordIndex):
            return array_records.read_image(_FILES.reader(path), path, index, i)
        return tfrecords.read_image(_FILES.descriptor(path), index, i)

    def file(self, i: int) -> str:
        """The file that holds the image at position `i`."""
        return self.paths[self.index.files[i]]

    def where(self, i: int) -> str:
        """The record and the file of an example."""
        path, index = self.file(i), self.index
        if isinstance(index, ArrayRecordIndex):
            return f"record {index.positions[i]} of {path}"
        return f"record {tfrecords.record_number(path, int(index.starts[i]))} of {path}"

    def make_room(self) -> None:
        """Lets this process have all files of the source open at once.

        Raises:
            UserError (a `ValueError`): the system allows fewer.
        """
        _FILES.make_room(len(self.paths))


@dataclasses.dataclass(frozen=True)
class FileSource(StoredSource):
    """Photographs in files of their own, of any size and of the formats that Pillow reads.

    Attributes:
        root: Folder of the names.
    """

    index: FileIndex
    _: dataclasses.KW_ONLY
    root: str

    def read_image(self, i: int) -> bytes:
        """The file, or one of the same pixels that TensorFlow decodes to them."""
        with open(self.file(i), "rb") as file:
            return photographs.plain(file.read())

    def file(self, i: int) -> str:
        """The path of the image at position `i`."""
        return os.path.join(self.root, self.names[i])

    def where(self, i: int) -> str:
        """The path of the image at position `i`."""
        return self.file(i)

    def remedy(self) -> str:
        """What to do about an image that cannot be read."""
        return "replace or remove the file"


@dataclasses.dataclass(frozen=True)
class ForgivingSource(FileSource):
    """Files that a blank image replaces where they cannot be used.

    Attributes:
        bad: Reasons why images cannot be used, by position; it grows while they are read.
    """

    _: dataclasses.KW_ONLY
    bad: dict[int, str]

    @classmethod
    def reading(cls, source: FileSource, bad: dict[int, str]) -> "ForgivingSource":
        """The files of a source."""
        return cls(source.index, source.image_size, source.resize, root=source.root, bad=bad)

    def read_image(self, i: int) -> bytes:
        """The file, or a blank image."""
        if i not in self.bad:
            try:
                return super().read_image(i)
            except photographs.BadFile as error:
                self.bad[int(i)] = str(error)
            except OSError as error:
                self.bad[int(i)] = error.strerror or str(error)
        return photographs.blank()


@dataclasses.dataclass(frozen=True)
class SmallSource(StoredSource):
    """Images of one small size: a batch is read as pixels, as from memory.

    Attributes:
        of: Source of the files.
    """

    encoded: ClassVar[bool] = False
    _: dataclasses.KW_ONLY
    of: StoredSource

    @classmethod
    def reading(cls, source: StoredSource) -> "SmallSource":
        """The images of a source, which have its image size."""
        return cls(source.index, source.image_size, source.resize, of=source)

    def read_pixels(self, i: int) -> npt.NDArray[np.uint8]:
        """The image at position `i`, uint8 `[H, W, 3]`.

        Raises:
            BadFile: an image that cannot be read, or of another size.
        """
        pixels = photographs.pixels(self.of.read_image(i))
        if pixels.shape != self.image_shape:
            height, width, _ = pixels.shape
            raise photographs.BadFile(
                f"it is {width} x {height} pixels, and the others are {self.image_size} x "
                f"{self.image_size}"
            )
        return pixels

    def load(self) -> ArraySource:
        """All images in memory.

        Raises:
            UserError (a `ValueError`): an image that cannot be read.
        """
        images = np.empty((len(self), *self.image_shape), np.uint8)
        for i in range(len(self)):
            try:
                images[i] = self.read_pixels(i)
            except (*UNREADABLE, OSError) as error:
                raise UserError(
                    f"The image {self.where(i)} cannot be read ({error}); replace or remove it."
                ) from error
        return ArraySource(images, self.labels, np.arange(len(self)))

    def select(self, indices: npt.NDArray[np.int64]) -> Self:
        """The examples at `indices`, in that order."""
        return dataclasses.replace(
            self, index=self.index.select(indices), of=self.of.select(indices)
        )

    def read_image(self, i: int) -> bytes:
        """The file of the image at position `i`."""
        return self.of.read_image(i)

    def file(self, i: int) -> str:
        """The file in which the image at position `i` lies."""
        return self.of.file(i)

    def where(self, i: int) -> str:
        """The place of the image at position `i`, in words."""
        return self.of.where(i)

    def remedy(self) -> str:
        """What to do about an image that cannot be read."""
        return self.of.remedy()

    def make_room(self) -> None:
        """Prepares this process for reading."""
        self.of.make_room()


class _OpenFiles:
    """Files that are open for reading, until the process ends.

    They belong to no reader: TensorFlow keeps every Python function that a graph has called, so a
    reader is never garbage-collected and would never close its files.
    """

    def __init__(self) -> None:
        self._opened: dict[str, Any] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: str) -> int:
        """The descriptor of a file, which is opened on first use."""
        return self._open(path, lambda: os.open(path, os.O_RDONLY))

    def reader(self, path: str) -> Any:
        """The reader of an ArrayRecord file, which is opened on first use."""
        return self._open(path, lambda: array_records.open_reader(path))

    def _open(self, path: str, opens: Callable[[], Any]) -> Any:
        found = self._opened.get(path)
        if found is None:
            with self._lock:
                found = self._opened.get(path)
                if found is None:
                    found = self._opened[path] = opens()
        return found

    def make_room(self, files: int) -> None:
        """Lets this process open this many more files.

        Raises:
            UserError (a `ValueError`): the system allows fewer.
        """
        needed = len(self._opened) + files + _OTHER_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or needed <= soft:
            return
        if hard != resource.RLIM_INFINITY and needed > hard:
            raise UserError(
                f"Reading the records needs {needed} open files, but this machine allows {hard}; "
                "raise the limit (`ulimit -Hn`), or prepare the data set with fewer shards."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


_FILES = _OpenFiles()
_OTHER_FILES = 512  # open files of the interpreter, the libraries and the run

Source = ArraySource | StoredSource
