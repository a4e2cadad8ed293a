# SPDX-License-Identifier: Apache-2.0
"""Random numbers in NumPy that are a function of (seed, stream, index) alone."""

import math
import zlib
from collections.abc import Mapping

import numpy as np


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """The source of one step's or epoch's draws in one stream of random numbers.

    Args:
        seed: Seed of the run, from 0 to `2**63 - 1`.
        stream: Name of the stream.
        index: Number of the step or the epoch.
    """
    # The key separates streams, and the counter steps, by so much that they never overlap.
    key = np.array([seed, zlib.crc32(stream.encode())], np.uint64)
    counter = np.array([0, 0, index, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class RowUniforms:
    """Uniform numbers in `[0, 1)` for the rows of a batch, by name.

    They are drawn row by row, so that a row's numbers do not depend on the number of rows. A name's
    numbers do not depend on which other names are read.

    Args:
        numbers: Uniform numbers, float64 `[rows, sum of widths]`.
        widths: Number of columns of each name, in the order of the columns.
    """

    def __init__(self, numbers: np.ndarray, widths: Mapping[str, int]) -> None:
        self._numbers = numbers
        self._columns, start = {}, 0
        for name, width in widths.items():
            self._columns[name] = slice(start, start + width)
            start += width

    def many(self, name: str) -> np.ndarray:
        """All numbers of a name, float64 `[rows, width]`."""
        return self._numbers[:, self._columns[name]]

    def one(self, name: str) -> np.ndarray:
        """The first number of a name, float64 `[rows]`."""
        return self._numbers[:, self._columns[name].start]


def whole(uniform: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """Whole numbers int64 from 0 to `count - 1`, uniform where `uniform` is in `[0, 1)`."""
    return (uniform * count).astype(np.int64)


def normal(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Standard normal numbers from two independent uniform ones each (Box and Muller)."""
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)
