# SPDX-License-Identifier: Apache-2.0
"""Balanced Product of Calibrated Experts, and long-tailed recognition, in JAX."""

__version__ = "0.1.0"
