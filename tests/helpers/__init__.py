# SPDX-License-Identifier: Apache-2.0
"""Helpers that several test modules use. Test modules do not import each other.

Attributes:
    ROOT: Root of the repository.
    FIXTURES: Folder of stored numbers and runs; its `README.md` says what they are.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
