# SPDX-License-Identifier: Apache-2.0
"""One file a data set, whose `get_config(arguments)` makes an experiment's config.

Installed, this folder is `balpoe_jax.configs`; see `[tool.setuptools]` in pyproject.toml.
"""
