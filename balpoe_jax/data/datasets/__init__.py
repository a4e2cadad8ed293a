# SPDX-License-Identifier: Apache-2.0
"""The data sets, loaded and checked, and the distributions that test sets are drawn from."""

from balpoe_jax.data.datasets.registry import DATASETS, load, published

__all__ = ["DATASETS", "load", "published"]
