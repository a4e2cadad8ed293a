# SPDX-License-Identifier: Apache-2.0
"""The config of an experiment: fields, arguments of config files, checks, recipes."""

from balpoe_jax.config.arguments import parse_arguments
from balpoe_jax.config.checks import check_config
from balpoe_jax.config.fields import (
    AUGMENTATIONS,
    BAD_IMAGE_POLICIES,
    DTYPES,
    OTHER_AUGMENT,
    PRECISIONS,
    TEST_VIEW,
    VIEWS,
    default_config,
    resolve_taus,
    with_defaults,
)

__all__ = [
    "AUGMENTATIONS",
    "BAD_IMAGE_POLICIES",
    "DTYPES",
    "OTHER_AUGMENT",
    "PRECISIONS",
    "TEST_VIEW",
    "VIEWS",
    "check_config",
    "default_config",
    "parse_arguments",
    "resolve_taus",
    "with_defaults",
]
