# SPDX-License-Identifier: Apache-2.0
"""Configs as the commands load them."""

import importlib.util

from tests.helpers import ROOT


def get_config(name: str, arguments: str | None = None):
    """The config of `configs/NAME.py` with what stands after the colon of `--config`."""
    path = ROOT / "configs" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.get_config(arguments)
