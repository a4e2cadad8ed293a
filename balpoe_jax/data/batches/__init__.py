# SPDX-License-Identifier: Apache-2.0
"""Which images make a batch, and how: samplers, mixtures, replacements of bad ones."""
