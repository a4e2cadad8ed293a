# SPDX-License-Identifier: Apache-2.0
"""The data sets, loaded and checked, and the class distributions of their test sets."""

from balpoe_jax.data.datasets.registry import DATASETS, FOLDER, load, published

__all__ = ["DATASETS", "FOLDER", "load", "published"]
