# SPDX-License-Identifier: Apache-2.0
"""Compilers that may not be installed."""

import importlib.util

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
