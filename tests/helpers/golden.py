# SPDX-License-Identifier: Apache-2.0
"""The golden numbers in `fixtures/golden_*.npz`; `fixtures/README.md` says what they are."""

from functools import cache

import numpy as np

from tests.helpers import FIXTURES

_FILES = sorted(FIXTURES.glob("golden_*.npz"))


@cache
def _arrays() -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for path in _FILES:
        with np.load(path, allow_pickle=False) as file:
            arrays |= file
    return arrays


def golden(prefix: str) -> dict[str, np.ndarray]:
    """The arrays under `prefix/`, by the rest of their names."""
    found = {k.removeprefix(f"{prefix}/"): v for k, v in _arrays().items() if k.startswith(prefix)}
    if not found:
        raise KeyError(prefix)
    return found


def cases(prefix: str) -> list[str]:
    """The distinct names right after `prefix/`."""
    return sorted({k.split("/")[1] for k in _arrays() if k.startswith(f"{prefix}/")})


def max_relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected magnitude, for arrays of one shape."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
