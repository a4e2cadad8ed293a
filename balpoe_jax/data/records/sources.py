# SPDX-License-Identifier: Apache-2.0
"""Random access to the examples of a split.

A source has `labels` int64 `[N]`. `encoded` says whether its images have to be decoded, and
`image_shape` is their shape in a batch. `balpoe_jax.data.records.readers` reads a source inside a
tf.data graph; nothing here needs TensorFlow.
"""

import dataclasses
import os
import resource
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.records import array_records, tfrecords
from balpoe_jax.data.records.array_records import ArrayRecordIndex
from balpoe_jax.data.records.tfrecords import RecordIndex
from balpoe_jax.errors import UserError


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


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Encoded photographs in TFRecord or ArrayRecord files, read one by one.

    Attributes:
        paths: Files of the split.
        index: Places of the images in these files.
        image_size: Height and width in pixels of the images in a batch.
        resize: Length in pixels of a test image's short side before the central crop.
    """

    encoded: ClassVar[bool] = True
    paths: tuple[str, ...]
    index: RecordIndex | ArrayRecordIndex
    image_size: int
    resize: int

    def __post_init__(self) -> None:
        if not len(self.index.labels):
            raise UserError(f"There is no example in {', '.join(self.paths) or 'no file'}.")
        if not 1 <= self.image_size <= self.resize:
            raise UserError(
                "Expected an image size of at least 1 pixel and a resized short side of at least "
                f"that, got {self.image_size} and {self.resize}."
            )

    def __len__(self) -> int:
        return len(self.index.labels)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 `[N]`."""
        return self.index.labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, 3)` after decoding."""
        return self.image_size, self.image_size, 3

    def select(self, indices: npt.NDArray[np.int64]) -> "RecordSource":
        """The examples at `indices`, in that order."""
        return dataclasses.replace(self, index=self.index.select(indices))

    def ids(self, indices: npt.NDArray[np.integer]) -> list[str]:
        """The names of the examples at `indices`, as they are stored with the images."""
        return [str(name) for name in self.index.names[indices]]

    def read_image(self, i: int) -> bytes:
        """The encoded image at position `i`; raises `DamagedRecord` or `OSError`."""
        path, index = self.paths[self.index.files[i]], self.index
        if isinstance(index, ArrayRecordIndex):
            return array_records.read_image(_FILES.reader(path), path, index, i)
        return tfrecords.read_image(_FILES.descriptor(path), index, i)

    def where(self, i: int) -> str:
        """The record and the file of an example."""
        path, index = self.paths[self.index.files[i]], self.index
        if isinstance(index, ArrayRecordIndex):
            return f"record {index.positions[i]} of {path}"
        return f"record {tfrecords.record_number(path, int(index.starts[i]))} of {path}"

    def make_room(self) -> None:
        """Lets this process have all files of the source open at once.

        Raises:
            UserError (a `ValueError`): the system allows fewer.
        """
        _FILES.make_room(len(self.paths))


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

Source = ArraySource | RecordSource
