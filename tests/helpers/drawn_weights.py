# SPDX-License-Identifier: Apache-2.0
"""Weights of a network that are a function of their names, so that no file need hold them."""

import zlib
from collections.abc import Mapping

import numpy as np


def draw(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays float32 by name, in PyTorch's layout and of a size that keeps activations near one.

    Args:
        shapes: Shapes by name; what ends in `num_batches_tracked` is left out.
    """
    return {
        name: _array(name, shape)
        for name, shape in shapes.items()
        if not name.endswith("num_batches_tracked")
    }


def images(number: int, side: int) -> np.ndarray:
    """Images float32 `[N, side, side, 3]`."""
    return np.random.default_rng(7).normal(size=(number, side, side, 3)).astype(np.float32)


def _array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) > 1:
        values *= np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("running_var"):
        values = np.exp(0.2 * values)
    elif name.endswith("weight"):
        values = 1 + 0.1 * values
    else:
        values *= 0.1
    return values.astype(np.float32)
