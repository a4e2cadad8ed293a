# SPDX-License-Identifier: Apache-2.0
"""Tests, in folders that mirror the package; what they share is in `tests.helpers`."""
