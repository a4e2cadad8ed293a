# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings of the package run."""

import doctest
import importlib

import pytest

from tests.helpers import ROOT

# Modules whose examples need an accelerator or a package that may not be there, with the reason.
SKIPPED: dict[str, str] = {}

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "balpoe_jax").rglob("*.py"))
    if ">>> " in path.read_text()
]


def test_the_losses_have_examples() -> None:
    assert "balpoe_jax.losses" in MODULES and set(SKIPPED) <= set(MODULES)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in SKIPPED])
def test_examples_run(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0 and failed == 0
