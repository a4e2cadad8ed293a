# SPDX-License-Identifier: Apache-2.0
"""The config of an experiment: settings, arguments of config files, defaults of data sets."""

from balpoe_jax.config.arguments import parse_arguments
from balpoe_jax.config.resolve import (
    AUGMENTATIONS,
    default_config,
    from_record,
    resolve,
    section_config,
    to_record,
    with_defaults,
)
from balpoe_jax.config.settings import PRECISIONS, Settings

__all__ = [
    "AUGMENTATIONS",
    "PRECISIONS",
    "Settings",
    "default_config",
    "from_record",
    "parse_arguments",
    "resolve",
    "section_config",
    "to_record",
    "with_defaults",
]
