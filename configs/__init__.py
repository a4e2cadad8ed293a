# SPDX-License-Identifier: Apache-2.0
"""Config files, one for each data set: `get_config(arguments)` returns an experiment's config.

Installed, this folder is `balpoe_jax.configs`; see `[tool.setuptools]` in pyproject.toml.
"""
